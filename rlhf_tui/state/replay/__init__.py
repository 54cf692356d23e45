"""Replays a recorded session: the clock of the replay, and the feed that reads up to it."""
