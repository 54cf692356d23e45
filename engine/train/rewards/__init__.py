"""Reward sources, and the weighted sum of their scores."""
