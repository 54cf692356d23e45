"""Commands that only read sessions."""
