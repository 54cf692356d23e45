"""The memory planner: shapes of models, estimate, advice, and the capacity of the machine."""
