"""Checks a session on disk: what the engine promises to keep is there, and it agrees. No torch."""
