"""What a session had recorded up to a moment of its history, for a replay."""
