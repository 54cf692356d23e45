"""Generates responses on this machine for a run on another one.

``python -m engine.launch.rollout.join HOST:PORT SECONDS SECRET_FILE PYTHON``

`rlhf-tui join --rollout` executes this module. It connects to the port of `rollout.rendezvous` on
the first machine of the run, starts an engine here, and passes messages between the two. When the
engine or the connection ends, it starts over, until the run has ended. The secret comes from
SECRET_FILE, or from the environment if that is `-`. An empty PYTHON stands for the default.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec
from msgspec.structs import replace

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.rollout import RolloutConfig
from engine.errors import AuthenticationError, LinkError, UserInputError
from engine.launch.rollout.engine import (
    engine_environment,
    find_vllm,
    rollout_command,
    rollout_python,
)
from engine.launch.rollout.received_files import ReceivedFiles
from engine.launch.secret import SECRET_VARIABLE, read_secret
from engine.protocol import frames, sockets
from engine.protocol.frames import Message
from engine.protocol.machines.authentication import LOST_AFTER, AuthenticatedConnection, connect
from engine.protocol.rollout.join_messages import (
    FilePart,
    Joined,
    JoinRefused,
    RolloutJoinInfo,
    RunOver,
    ToJoined,
    decode_to_joined,
    rollout_secret,
)
from engine.protocol.rollout.messages import (
    EngineFailed,
    Generate,
    LoadWeights,
    NextTurns,
    Start,
)
from engine.session.temporary_folders import TemporaryFolder

RETRY_INTERVAL = 2.0
"""Seconds between two attempts to reach the first machine."""
DONE, INVALID, TIMED_OUT = 0, 2, 4
"""Exit codes, as of `rlhf-tui join`."""


class RunOverError(Exception):
    """The run has ended: its first machine says so, or the file of the secret is gone."""


def main() -> None:
    """Runs until the run ends (exit code 0), refuses this machine (2), or is out of reach (4)."""
    address, wait, named, python = sys.argv[1:5]
    file = Path(named) if named != "-" else None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    rollout = RolloutConfig(engine="vllm", python=python or None)
    joined = False
    try:
        check_python(rollout_python(rollout))
        print_status(f"waiting for a run at {address}")
        while True:
            machine, info = find_run(address, file, float(wait), joined=joined)
            joined = True
            print_status(f"generating for {info.session} at {address}")
            with machine:
                ended = generate(machine, info, rollout)
            print_status(f"{ended}; waiting for a restart")
    except RunOverError:
        exit_with("the run is over", DONE)
    except UserInputError as error:
        exit_with(str(error), INVALID)
    except LinkError as error:
        exit_with(f"no run to join: {error}", TIMED_OUT)


def check_python(python: str) -> None:
    """Raises UserInputError if a Python has no vLLM."""
    if find_vllm(python) is None:
        raise UserInputError(
            f"{python} has no vLLM: run `make vllm`, or name a Python that has it with --python"
        )


def find_run(
    address: str, file: Path | None, wait: float, *, joined: bool
) -> tuple[AuthenticatedConnection, RolloutJoinInfo]:
    """Connects to the first machine, as soon as it needs a machine that generates.

    Args:
        address: `HOST:PORT`.
        file: holds the secret; it is read again each time. None: the environment has it.
        wait: seconds to try.
        joined: whether this machine has generated before. If not, it waits for the next run when a
            run has ended or the file is gone.

    Raises:
        RunOverError: this machine has generated, and the run is over.
        UserInputError: there is no usable secret, or this machine cannot take part.
        LinkError: there was no run in time.
    """
    deadline = time.monotonic() + wait
    problem = ""
    while time.monotonic() < deadline:
        secret = read_secret(file)
        if secret is None and file is None:
            raise UserInputError(f"no secret: export {SECRET_VARIABLE}, or give --secret-file")
        if secret is None:
            if joined:
                raise RunOverError
            problem = f"there is no file {file}: the run has ended or not started"
        else:
            try:
                machine = connect(address, rollout_secret(secret))
                return machine, offer(machine, joined_before=joined)
            except RunOverError:
                if joined:
                    raise
                problem = f"{address}: the run is over"
            except AuthenticationError as error:
                problem = f"{address}: {error}; give the same on all machines"
                if file is None:  # a file may be of an earlier start of the run
                    raise UserInputError(problem) from error
            except (OSError, LinkError) as error:
                problem = str(error)
        time.sleep(RETRY_INTERVAL)
    raise LinkError(f"{address}: {problem}")


def offer(machine: AuthenticatedConnection, *, joined_before: bool) -> RolloutJoinInfo:
    """Offers this machine to the run; returns the reply. Closes the connection on an error.

    Raises:
        UserInputError: it cannot take part.
        RunOverError: the run is over.
        OSError: the first machine is gone, or needs no other machine.
        LinkError: it runs a different version.
    """
    try:
        machine.notice_loss()
        joined = Joined(machine=os.uname().nodename, joined_before=joined_before)
        machine.send(msgspec.msgpack.encode(joined))
        return accepted(decode_to_joined(machine.receive(LOST_AFTER)))
    except BaseException:
        machine.close()
        raise


def accepted(reply: ToJoined) -> RolloutJoinInfo:
    """Decodes the reply to an offer. Raises like :func:`offer`."""
    if isinstance(reply, RunOver):
        raise RunOverError
    if isinstance(reply, JoinRefused):
        raise UserInputError(f"{reply.text}: install the same on all machines")
    if not isinstance(reply, RolloutJoinInfo):
        raise LinkError(f"unexpected {type(reply).__name__} of the first machine")
    return reply


def generate(
    machine: AuthenticatedConnection, info: RolloutJoinInfo, rollout: RolloutConfig
) -> str:
    """Starts an engine and serves the first machine with it; returns why that ended.

    Args:
        machine: the connection to the first machine.
        info: its reply.
        rollout: names this machine's Python.
    """
    # Which GPUs and which Python the run uses on its first machine means nothing here.
    here = replace(info.rollout, python=rollout.python, gpus=[], engines=1, joined=0)
    with (
        contextlib.closing(LocalEngine(replace(info.launch, gpus=[]), here)) as engine,
        contextlib.closing(ReceivedFiles()) as files,
    ):
        return serve(machine, engine.socket, files)


class LocalEngine:
    """An engine's process on this machine, and the client's end of its socket."""

    def __init__(self, launch: LaunchConfig, rollout: RolloutConfig) -> None:
        """Starts it; its output is that of this process."""
        self._folder = TemporaryFolder()
        listener, path = sockets.listen(self._folder.path, sockets.ROLLOUT_NAME)
        with listener:
            self._process = subprocess.Popen(  # noqa: S603 - the operator's Python, our own script
                rollout_command(rollout, listener.fileno(), self._folder.path),
                env=engine_environment(launch, rollout, 0),
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
            self.socket = sockets.connect(path)
        self.socket.settimeout(None)

    def close(self) -> None:
        """Ends it and the processes that it has started."""
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.close()


def serve(machine: AuthenticatedConnection, engine: socket.socket, files: ReceivedFiles) -> str:
    """Passes messages on until one side is gone; returns which.

    Args:
        machine: the connection to the first machine.
        engine: the local engine; it has received no message yet.
        files: stores the files that the first machine sends.

    Raises:
        LinkError: the first machine sends a message that no engine may get.
    """
    while True:
        readable, _, _ = select.select([machine.fileno(), engine.fileno()], [], [])
        if engine.fileno() in readable:
            try:
                reply = frames.receive(engine)
            except OSError:
                return "the engine has ended"
            try:
                machine.send(reply)
            except OSError as error:
                return f"the first machine is gone ({error})"
        if machine.fileno() in readable:
            try:
                message = decode_to_joined(machine.receive(LOST_AFTER))
            except (OSError, AuthenticationError) as error:
                return f"the first machine is gone ({error})"
            if isinstance(message, FilePart):
                try:
                    files.write(message)
                except OSError as error:
                    text = f"{os.uname().nodename} cannot store the weights: {error}"
                    machine.send(msgspec.msgpack.encode(EngineFailed(text=text, final=True)))
                    return text
                continue
            try:
                engine.sendall(frames.encode(with_paths(message, files)))
            except OSError:
                return "the engine has ended"


def with_paths(message: Message, files: ReceivedFiles) -> Message:
    """A message for the engine, with the paths of this machine.

    Raises:
        LinkError: the engine may not get this message, such as CUDA IPC handles: these are pickled.
    """
    match message:
        case Start():
            return replace(message, model=str(files.model))
        case LoadWeights(transfer="file") if files.weights is not None:
            return replace(message, path=str(files.weights), handles=b"")
        case Generate() | NextTurns():
            return message
        case _:
            raise LinkError(f"the first machine sent {type(message).__name__} out of turn")


def print_status(text: str) -> None:
    """Prints a line for the operator or for a scheduler's log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def exit_with(text: str, code: int) -> NoReturn:
    """Prints why this process ends, and ends it."""
    (sys.stderr if code else sys.stdout).write(f"{text}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
