"""Held-out evaluation: prompts that are never trained on, and scores that training does not see."""
