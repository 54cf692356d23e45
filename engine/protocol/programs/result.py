"""What a program of the engine prints for the command line that runs it: JSON in its last line."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec
from msgspec import Struct

from engine.errors import RlhfError, error_text


class ProgramFailure(Struct, frozen=True):
    """What is printed in the place of a result."""

    error: str
    exit_code: int

    @classmethod
    def of(cls, error: RlhfError) -> "ProgramFailure":
        """Of an error that the user gets in one line."""
        return cls(error_text(error), error.exit_code)


def print_result(work: Callable[[], object]) -> NoReturn:
    """Does the program's work, prints what it returns or its RlhfError, and ends the process."""
    try:
        result: object = work()
    except RlhfError as error:
        result = ProgramFailure.of(error)
    # Unlike json, this encoder writes null for a metric that is not finite.
    sys.stdout.flush()
    sys.stdout.buffer.write(b"\n" + msgspec.json.encode(result) + b"\n")
    sys.stdout.buffer.flush()
    os._exit(0)  # torch's threads may keep the interpreter from ending
