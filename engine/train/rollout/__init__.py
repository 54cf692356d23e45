"""Rollouts: responses sampled from the policy."""
