"""The kinds of reward sources, one module each, and what they share."""
