"""Wav2Vec2-Conformer from scratch: a book of notebooks that is also a library."""

__version__ = "0.1.0"
