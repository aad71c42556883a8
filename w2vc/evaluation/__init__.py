"""Measures with intervals, one report per head, probes of layers and codes."""
