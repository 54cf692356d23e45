"""Communication between rank 0 and rollout engines, on this machine or on others."""
