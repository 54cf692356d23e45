"""Charts of metrics in Braille characters."""
