"""Braille charts."""
