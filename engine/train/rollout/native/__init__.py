"""Generates rollouts in the ranks with the trained model itself, using a key-value cache."""
