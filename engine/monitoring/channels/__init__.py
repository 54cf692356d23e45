"""The channels that send notifications outside the terminal: one module for each kind."""
