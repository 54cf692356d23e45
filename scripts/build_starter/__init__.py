"""Builds the starter models shipped in ``engine/starter``; see ``__main__``."""
