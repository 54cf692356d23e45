"""The processes that a supervisor starts and ends: ranks and rollout engines."""
