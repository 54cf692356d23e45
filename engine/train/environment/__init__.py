"""Responses of several turns: the policy speaks, an environment of the user's replies."""
