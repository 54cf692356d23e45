"""Programs of the engine that need torch, which the command line never imports."""

import subprocess
import sys

import msgspec

from engine.config.schema import RunConfig
from engine.errors import RlhfError, UserInputError
from engine.launch.environment import clean_environment, rank_environment


class _Failure(msgspec.Struct):
    """What a program prints instead of a result."""

    error: str
    exit_code: int


def run_engine_program(module: str, *arguments: str, config: RunConfig, failed: str) -> bytes:
    """Runs a module of the engine that reads a configuration and prints JSON in its last line.

    Args:
        module: its name.
        arguments: of its command line.
        config: passed on standard input; its section `launch` determines the environment.
        failed: how the message begins if the program ends without a result.

    Returns:
        The JSON.

    Raises:
        UserInputError: the program says that something which was given cannot be used.
        RlhfError: it failed.
    """
    done = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", module, *arguments],
        input=msgspec.json.encode(config),
        env=clean_environment() | rank_environment(config.launch),
        capture_output=True,
        check=False,
    )
    result = (done.stdout.splitlines() or [b""])[-1]
    if done.returncode or not result.startswith(b"{"):
        errors = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise RlhfError(f"{failed}: {errors[-1]}")
    if result.startswith(b'{"error"'):
        failure = msgspec.json.decode(result, type=_Failure)
        kind = UserInputError if failure.exit_code == UserInputError.exit_code else RlhfError
        raise kind(failure.error)
    return result
