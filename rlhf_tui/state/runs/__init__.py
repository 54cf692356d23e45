"""Comparisons of several runs: overlaid curves, and the settings that differ."""
