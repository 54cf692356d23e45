"""Starts the ranks of one machine through torchrun; joins further machines to a run."""
