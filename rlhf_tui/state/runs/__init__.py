"""Several runs beside each other: overlaid curves, and the settings that differ."""
