"""What a step trains on: responses, their scores, and the checks of a rollout."""
