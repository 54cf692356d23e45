"""The Textual app: modes, keys, following a session, starting engines."""
