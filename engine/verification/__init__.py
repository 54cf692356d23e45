"""Checks that a session on disk is complete and consistent. Does not import torch."""
