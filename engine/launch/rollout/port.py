"""The port at which machines join a run to generate: authenticates them.

Several relays may accept from one port, each while it needs a machine.
"""

import contextlib
import logging
import queue
import select
import socket
import threading
import time
from collections.abc import Generator

import msgspec

from engine import __version__
from engine.errors import LinkError
from engine.protocol.machines.authentication import AuthenticatedConnection, accept
from engine.protocol.rollout.join_messages import (
    Joined,
    JoinRefused,
    RolloutJoinInfo,
    RunOver,
    decode_joined,
)

log = logging.getLogger("rollout")

POLL_INTERVAL = 0.2
"""Seconds between two checks whether a machine has authenticated."""
MAX_HANDSHAKES = 16
"""Maximum number of simultaneous handshakes; other machines wait."""
OFFER_TIMEOUT = 10.0
"""Seconds for an authenticated machine to send its offer."""
END_TIMEOUT = 3.0
"""Seconds for machines to learn that the run is over. One that has lost its connection tries again
at once, or within two seconds."""


def wait_for_machine(
    port: socket.socket, secret: bytes, info: RolloutJoinInfo
) -> tuple[AuthenticatedConnection, str]:
    """Waits for a machine that knows the secret; returns the connection and its name.

    Args:
        port: the listening socket.
        secret: of :func:`~engine.protocol.rollout.join_messages.rollout_secret`.
        info: sent to the machine.
    """
    with contextlib.closing(_joining(port, secret)) as joining:
        while True:
            if (joined := next(joining)) is not None:
                machine, offer = joined
                with contextlib.suppress(OSError):
                    machine.send(msgspec.msgpack.encode(info))
                    return machine, offer.machine


def announce_end(port: socket.socket, secret: bytes, machines: int) -> None:
    """Tells machines that join again that the run is over; blocks for at most :data:`END_TIMEOUT`.

    Args:
        port: the listening socket, from which no relay accepts any more.
        secret: as for :func:`wait_for_machine`.
        machines: the number of machines that have generated; returns once that many were told.
            Others that have waited in vain are told, too.
    """
    deadline = time.monotonic() + END_TIMEOUT
    with contextlib.closing(_joining(port, secret)) as joining:
        while machines and time.monotonic() < deadline:
            if (joined := next(joining)) is not None:
                with joined[0] as machine, contextlib.suppress(OSError):
                    machine.send(msgspec.msgpack.encode(RunOver()))
                    machines -= joined[1].joined_before


def _joining(
    port: socket.socket, secret: bytes
) -> Generator[tuple[AuthenticatedConnection, Joined] | None, None, None]:
    """Yields each machine that authenticates, with its offer; None if none has for a while.

    The generator closes the connections of machines that it has not yielded; they try again.
    """
    port.setblocking(False)
    found: queue.SimpleQueue[tuple[AuthenticatedConnection, Joined]] = queue.SimpleQueue()
    closed = threading.Event()
    slots = threading.BoundedSemaphore(MAX_HANDSHAKES)

    def prove(sock: socket.socket, peer: str) -> None:
        try:
            found.put(_let_join(sock, secret))
        except (OSError, LinkError) as error:
            log.warning("rollout.rendezvous: refused a connection from %s: %s", peer, error)
        finally:
            slots.release()
            if closed.is_set():
                _close_all(found)

    try:
        while True:
            readable, _, _ = select.select([port], [], [], POLL_INTERVAL)
            try:
                yield found.get_nowait()
            except queue.Empty:
                yield None
            if port not in readable:
                continue
            if not slots.acquire(blocking=False):
                time.sleep(POLL_INTERVAL)
                continue
            try:
                sock, peer = port.accept()
            except OSError:  # another relay was faster
                slots.release()
                continue
            sock.setblocking(True)
            threading.Thread(target=prove, args=(sock, peer[0]), daemon=True).start()
    finally:
        closed.set()
        _close_all(found)


def _close_all(found: "queue.SimpleQueue[tuple[AuthenticatedConnection, Joined]]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            found.get_nowait()[0].close()


def _let_join(sock: socket.socket, secret: bytes) -> tuple[AuthenticatedConnection, Joined]:
    """Authenticates a machine, and reads its offer.

    Raises:
        OSError: it is gone, or took too long.
        LinkError: it does not know the secret, or runs another version.
    """
    machine = accept(sock, secret)
    try:
        machine.notice_loss()
        offer: Joined = decode_joined(machine.receive(OFFER_TIMEOUT))
        _check_version(machine, offer)
    except BaseException:
        machine.close()
        raise
    return machine, offer


def _check_version(machine: AuthenticatedConnection, offer: Joined) -> None:
    """Refuses a machine with another version. Raises LinkError or OSError."""
    if offer.software != __version__:
        text = f"the run has version {__version__} of rlhf-tui, this machine {offer.software}"
        machine.send(msgspec.msgpack.encode(JoinRefused(text=text)))
        raise LinkError(text)
