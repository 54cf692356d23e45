"""The output of an engine's program for the command line that runs it: JSON on its last line."""

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec
from msgspec import Struct

from engine.errors import RlhfError, error_text


class ProgramNotice(Struct, frozen=True, tag="notice"):
    """A line for the waiting user, printed before the result."""

    text: str


class ProgramFailure(Struct, frozen=True):
    """Printed in place of a result."""

    error: str
    exit_code: int

    @classmethod
    def of(cls, error: RlhfError) -> "ProgramFailure":
        """Converts an error that the user is shown in one line."""
        return cls(error_text(error), error.exit_code)


class NoticeHandler(logging.Handler):
    """Prints each record of a logger as a :class:`ProgramNotice`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        _print(ProgramNotice(record.getMessage()))


def _print(line: object) -> None:
    # Unlike json, this encoder writes null for a metric that is not finite.
    sys.stdout.flush()
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


def print_result(work: Callable[[], object]) -> NoReturn:
    """Runs the program's work, prints its result or its RlhfError, and ends the process."""
    try:
        result: object = work()
    except RlhfError as error:
        result = ProgramFailure.of(error)
    _print(result)
    os._exit(0)  # torch's threads may keep the interpreter from ending
