"""The engine: trains a language model with PPO in the background and keeps the session's record."""

__version__ = "0.1.0"
