"""Lumiere: train small GPT-style transformers and look inside them."""

__version__ = "0.1.0"
