"""Calls what a user wrote: reward functions, environments and tools."""
