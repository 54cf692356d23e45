"""A session as it was recorded up to a moment of its history, for a replay."""
