"""Takes the place of a rollout engine that runs on another machine.

``python -m engine.launch.rollout.relay SOCKET_FD PORT_FD SESSION_FOLDER ENGINE``

To the supervisor and to rank 0 a relay looks like an engine. It lets one machine join at the port
of `rollout.rendezvous`, and passes on the messages of both sides, with the files that they name.
When it loses the machine, it reports that and exits. The supervisor then starts another relay, and
the same machine or another one joins it.
"""

import contextlib
import logging
import os
import select
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from engine.errors import LinkError, first_line
from engine.launch.environment import LOG_ENCODING, clean_environment
from engine.launch.parent_death import PARENT_VARIABLE, die_with_parent
from engine.launch.rollout.port import wait_for_machine
from engine.launch.secret import SECRET_VARIABLE
from engine.log_lines import log_to
from engine.protocol import frames
from engine.protocol.frames import Message
from engine.protocol.machines.authentication import LOST_AFTER, AuthenticatedConnection
from engine.protocol.rollout.join_messages import (
    PART,
    WEIGHTS,
    FilePart,
    RolloutJoinInfo,
    rollout_secret,
)
from engine.protocol.rollout.messages import EngineFailed, LoadWeights, Start, decode_to_engine
from engine.protocol.rollout.server import FAILED, first_client, report
from engine.session.folder import SessionFolder

log = logging.getLogger("rollout")


class MachineLostError(Exception):
    """The connection to the joined machine is broken."""


def relay_command(listener_fd: int, port_fd: int, folder: Path, engine: int) -> list[str]:
    """The command that starts a relay in place of an engine."""
    words = [str(listener_fd), str(port_fd), str(folder), str(engine)]
    return [sys.executable, "-P", "-m", "engine.launch.rollout.relay", *words]


def relay_environment(secret: str) -> dict[str, str]:
    """The environment of a relay; `secret` is that of the run."""
    settings = {
        PARENT_VARIABLE: str(os.getpid()),
        SECRET_VARIABLE: secret,
        "PYTHONUNBUFFERED": "1",
    }
    return clean_environment() | settings | LOG_ENCODING


def main() -> NoReturn:
    """Serves rank 0 until it disconnects (exit status 0) or the machine is lost."""
    die_with_parent()
    log_to(sys.stdout)
    listener, port = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])
    session = SessionFolder(Path(sys.argv[3]))
    config = session.config()
    info = RolloutJoinInfo(session=session.name, launch=config.launch, rollout=config.rollout)
    log.info("waiting for a machine that generates, at %s", config.rollout.rendezvous)
    # Before rank 0 has loaded: the machine starts its engine meanwhile.
    machine, name = wait_for_machine(port, rollout_secret(os.environ[SECRET_VARIABLE]), info)
    port.close()
    log.info("%s has joined", name)
    client, start = first_client(listener)
    try:
        relay(client, start, machine)
    except MachineLostError as error:
        text = f"the machine {name}, which generates, is lost: {error}"
        log.warning(text)
        report(client, EngineFailed(text=text))
        sys.exit(FAILED)
    except LinkError as error:
        report(client, EngineFailed(text=first_line(error), final=True))
        sys.exit(FAILED)
    except OSError as error:
        log.info("rank 0 has disconnected (%s)", error)
    sys.exit(0)


def relay(client: socket.socket, start: Start, machine: AuthenticatedConnection) -> NoReturn:
    """Passes messages on until one side is gone.

    Args:
        client: the connection to rank 0.
        start: its first message.
        machine: the joined machine, which already knows what to start.

    Raises:
        OSError: rank 0 has disconnected.
        MachineLostError: the machine is gone.
        LinkError: rank 0 sends a message that cannot be passed on.
    """
    for path in sorted(Path(start.model).glob("*.json")):
        send_file(machine, path, path.name)
    send(machine, start)
    while True:
        readable, _, _ = select.select([machine.fileno(), client.fileno()], [], [])
        if machine.fileno() in readable:
            with machine_errors():
                reply = machine.receive(LOST_AFTER)
            client.sendall(frames.pack(reply))
        if client.fileno() in readable:
            body = frames.receive(client)
            message = decode_to_engine(body)
            if isinstance(message, LoadWeights):
                send_file(machine, Path(message.path), WEIGHTS)
            with machine_errors():
                machine.send(body)


def send_file(machine: AuthenticatedConnection, path: Path, name: str) -> None:
    """Sends a file in parts. Raises LinkError if it cannot be read; else like :func:`send`."""
    for part in parts_of(path, name):
        send(machine, part)


def parts_of(path: Path, name: str) -> Iterator[FilePart]:
    """A file as messages; an empty one is one message. Raises LinkError."""
    try:
        with path.open("rb") as file:
            size, offset = os.fstat(file.fileno()).st_size, 0
            while offset == 0 or offset < size:
                data = file.read(PART)
                if size and not data:
                    raise LinkError(f"{path} has become shorter")
                yield FilePart(name=name, offset=offset, size=size, data=data)
                offset += max(1, len(data))
    except OSError as error:
        raise LinkError(f"cannot read {path}: {error}") from error


def send(machine: AuthenticatedConnection, message: Message) -> None:
    """Sends a message to the machine. Raises MachineLostError."""
    with machine_errors():
        machine.send(msgspec.msgpack.encode(message))


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Context manager that turns connection errors into :class:`MachineLostError`."""
    try:
        yield
    except (OSError, LinkError) as error:
        raise MachineLostError(str(error)) from error


if __name__ == "__main__":
    main()
