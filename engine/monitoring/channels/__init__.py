"""The channels that take notifications out of the terminal: one module for each kind."""
