"""Feeds: read a session in a thread and post updates of what the app shows."""
