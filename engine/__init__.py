"""The engine: trains a language model with PPO in the background and records the session."""

__version__ = "0.1.0"
