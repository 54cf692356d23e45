"""The policy with its value head, and how models are loaded."""
