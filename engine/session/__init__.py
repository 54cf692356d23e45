"""A session's folder, its lock, and the registry of live ones."""
