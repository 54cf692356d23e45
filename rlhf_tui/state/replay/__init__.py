"""Replays a recorded session: its clock, and the feed that reveals it."""
