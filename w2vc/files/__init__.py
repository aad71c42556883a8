"""Checkpoints on disk and on the hub: loading, saving, converting, exporting."""
