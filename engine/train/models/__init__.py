"""Loads and wraps the models of a run: the policy with its value function, and the reference."""
