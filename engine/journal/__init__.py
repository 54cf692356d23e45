"""The databases of a session: journal, samples and labels."""
