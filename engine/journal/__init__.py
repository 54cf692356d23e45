"""The journal, samples and labels of a session: one writer, many readers."""
