"""Checkpoints: the folder, and saving and loading by all ranks."""
