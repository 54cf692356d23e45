"""The Python API, for notebooks and scripts: ``from engine import Session, attach, start``.

:mod:`engine` exports these names, so that importing it stays cheap: this package is imported when
one of them is first used. docs/python.md shows each of them in use. Neither torch nor numpy is
imported.
"""

from engine.api.curve import Curve
from engine.api.launch import attach, fork, resume, sessions, start
from engine.api.session import Session

__all__ = ["Curve", "Session", "attach", "fork", "resume", "sessions", "start"]
