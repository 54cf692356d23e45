"""The memory planner: model shapes, the estimate, advice, and what the machine has."""
