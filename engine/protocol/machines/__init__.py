"""Between the machines of a run: authenticated connections and the key-value store."""
