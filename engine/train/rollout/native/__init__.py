"""Rollouts with the model that is trained, in the ranks: token by token, with a key-value cache."""
