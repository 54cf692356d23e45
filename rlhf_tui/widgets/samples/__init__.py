"""Widgets that show responses."""
