"""Rules between the keys of a configuration."""
