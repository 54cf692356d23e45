"""Prompts in a deterministic order, and random streams derived from the run's seed."""
