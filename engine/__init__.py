"""The engine: trains a language model with PPO in the background and records the session.

For scripts and notebooks it exports the names of :mod:`engine.api`, which is imported when one of
them is first used (PEP 562): a rank or the command line that imports this package pays nothing.
`__init__.pyi` declares their types.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = ("Curve", "Session", "attach", "fork", "resume", "sessions", "start")


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    return getattr(importlib.import_module("engine.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
