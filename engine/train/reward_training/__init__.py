"""Trains a reward model on the judgements of sessions, for `rlhf-tui reward train`."""
