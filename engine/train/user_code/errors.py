"""Where in the user's own code an exception was raised."""

import os
import sysconfig
from pathlib import Path
from types import TracebackType

import engine
from engine.errors import error_text, shortened, traceback_text

NOT_THE_USERS = (
    "<",  # as in <string>
    f"{Path(engine.__file__).parent}{os.sep}",
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")),
)
"""Beginnings of the paths of our code, of the standard library and of installed packages."""
SHOWN_MESSAGE = 240
"""Most characters of an exception's message that are quoted."""


def error_line(error: BaseException) -> str:
    """Type, message and line of the user's code, as `ValueError: no number at rewards.py:12`."""
    text = type(error).__name__
    if message := " ".join(error_text(error).split()):
        text += f": {shortened(message, SHOWN_MESSAGE)}"
    return text + user_line(error)


def user_line(error: BaseException) -> str:
    """The innermost line of the user's code, as ` at rewards.py:12`; empty if there is none."""
    lines = [
        f" at {Path(part.tb_frame.f_code.co_filename).name}:{part.tb_lineno}"
        for part in _user_parts(error)
    ]
    return lines[-1] if lines else ""


def user_traceback_text(error: BaseException) -> str:
    """The traceback as text, without the calls that lead to the user's code."""
    first = next(iter(_user_parts(error)), error.__traceback__)
    return traceback_text(error.with_traceback(first))


def _user_parts(error: BaseException) -> list[TracebackType]:
    """The parts of the traceback that are in the user's code, the outermost first."""
    found, part = [], error.__traceback__
    while part is not None:
        if not part.tb_frame.f_code.co_filename.startswith(NOT_THE_USERS):
            found.append(part)
        part = part.tb_next
    return found
