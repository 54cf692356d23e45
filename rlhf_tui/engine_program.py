"""Programs of the engine that need torch, which the command line never imports."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, TypeVar

import msgspec

from engine.config.sections.launch import LaunchConfig
from engine.errors import RlhfError, UserInputError
from engine.examined import examined
from engine.launch.environment import rank_environment
from engine.protocol.programs.result import ProgramFailure

T = TypeVar("T")
END_TIMEOUT = 10.0
"""Seconds that an interrupted program has to remove the files it has written."""


def run_engine_program(
    kind: type[T],
    module: str,
    *arguments: str,
    given: msgspec.Struct,
    launch: LaunchConfig,
    failed: str,
    on_line: Callable[[bytes], None] = lambda _line: None,
) -> T:
    """Runs a module of the engine that reads a struct and prints another one on its last line.

    If this process is interrupted, the program is sent SIGTERM and waited for.

    Args:
        kind: the struct that it prints, as JSON.
        module: its name.
        arguments: of its command line.
        given: passed on standard input as JSON.
        launch: the section of the configuration that determines the environment.
        failed: how the message begins if the program ends without a result.
        on_line: called with each line of its output as it comes.

    Raises:
        UserInputError: the program reports that part of its input cannot be used.
        RlhfError: it failed.
    """
    with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would fill up
        program = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=rank_environment(launch),
        )
        try:
            result = _talk(program, msgspec.json.encode(given), on_line)
        except BaseException:
            _end(program)
            raise
        return msgspec.json.decode(
            _checked(program.returncode, result, errors, failed), type=examined(kind)
        )


def _talk(
    program: "subprocess.Popen[bytes]", given: bytes, on_line: Callable[[bytes], None]
) -> bytes:
    """Writes the input and reads the output up to the end. Returns the last line."""
    if program.stdin is None or program.stdout is None:
        raise TypeError("the program was started without pipes")
    with contextlib.suppress(BrokenPipeError):  # it ended before; the code that follows says why
        program.stdin.write(given)
        program.stdin.close()
    last = b""
    for line in program.stdout:
        last = line.rstrip(b"\r\n")
        on_line(last)
    program.stdout.close()
    program.wait()
    return last


def _end(program: "subprocess.Popen[bytes]") -> None:
    program.terminate()
    try:
        program.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


def _checked(code: int, result: bytes, errors: IO[bytes], failed: str) -> bytes:
    """Returns the last line, unless it is no result. Raises what it reports."""
    if code or not result.startswith(b"{"):
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise RlhfError(f"{failed}: {lines[-1]}")
    if result.startswith(b'{"error"'):
        failure = msgspec.json.decode(result, type=examined(ProgramFailure))
        kind = UserInputError if failure.exit_code == UserInputError.exit_code else RlhfError
        raise kind(failure.error)
    return result
