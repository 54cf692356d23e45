"""Panels of the dashboard."""
