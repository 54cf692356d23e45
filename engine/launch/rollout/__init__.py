"""Starts rollout engines, on this machine and on those that join to generate."""
