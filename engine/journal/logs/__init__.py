"""What the writer of a journal records of commands, checkpoints and events."""
