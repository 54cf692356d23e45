"""Sessions: folder, access rights, lock, states, and the registry of live sessions."""
