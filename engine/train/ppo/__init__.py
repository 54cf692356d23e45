"""The numerics of PPO: advantages, losses, the update loop and its metrics."""
