"""Checkpoints: their folder layout, and saving and loading by all ranks."""
