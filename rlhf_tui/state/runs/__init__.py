"""Several runs: rows of a list, previews, overlaid curves, and the settings that differ."""
