"""Reward sources and how their scores are combined."""
