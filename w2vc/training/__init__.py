"""Runs: recipes, the loop, monitoring, and the demo checkpoint that they made."""
