"""Communication between the machines of a run: authenticated connections, key-value store."""
