"""The terminal side: the command line and the dashboard."""
