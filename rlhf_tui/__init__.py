"""The terminal side: what the operator types and sees."""
