"""Mutually authenticated connections between the machines of a run, by its shared secret.

Each side sends a random challenge, and proves by an HMAC over both challenges that it knows the
secret, which is never sent. From the challenges each connection derives two keys, one for each
direction. A frame carries an HMAC with such a key over its number and its body, so that frames
forged, changed, repeated, dropped, reordered or reflected by others are detected. Frames are not
encrypted: whoever sees the network can read them.

HMAC-SHA256 (RFC 2104) as in Python's standard library. The handshake follows the pattern of ISO/IEC
9798-4 (mutual authentication in three passes).
"""

import contextlib
import hmac
import os
import socket
import time
from typing import Self

from engine.errors import AuthenticationError, LinkError
from engine.protocol import frames

MAGIC = b"rlhf-tui store 1"
"""The first 16 bytes of each side: the protocol and its version."""
CHALLENGE = 32
"""Bytes of a challenge."""
PROOF = 32
"""Bytes of an HMAC."""
CONNECT_TIMEOUT = 10.0
"""Seconds for a connection to be accepted."""
HANDSHAKE_TIMEOUT = 10.0
"""Seconds that the other side has to prove that it knows the secret."""
LOST_AFTER = 60
"""Seconds without any sign of a machine that generates, or of its run, after which it is lost."""


class AuthenticatedConnection:
    """A connection after the handshake. One thread at a time may use it."""

    def __init__(self, sock: socket.socket, send_key: bytes, receive_key: bytes) -> None:
        """Takes the keys of :func:`connect` or :func:`accept`; call those instead."""
        self._socket = sock
        self._send_key = send_key
        self._receive_key = receive_key
        self._sent = self._received = 0

    def send(self, body: bytes) -> None:
        """Sends a frame. Raises OSError if the connection is broken."""
        tag = _frame_tag(self._send_key, self._sent, body)
        self._sent += 1
        self._socket.sendall(frames.HEADER.pack(PROOF + len(body)) + tag + body)

    def receive(self, timeout: float | None = None) -> bytes:
        """Receives the body of a frame.

        Args:
            timeout: seconds to wait for each part of it; None to wait without limit.

        Raises:
            OSError: the connection is broken or the timeout expired.
            LinkError: the frame is not the next one from the other side.
        """
        self._socket.settimeout(timeout)
        frame = frames.receive(self._socket)
        tag, body = frame[:PROOF], frame[PROOF:]
        expected = _frame_tag(self._receive_key, self._received, body)
        if not hmac.compare_digest(tag, expected):
            raise AuthenticationError("a frame was not sent by the other machine of the run")
        self._received += 1
        return body

    def fileno(self) -> int:
        """The file descriptor, to wait for the next frame; frames are not read ahead."""
        return self._socket.fileno()

    def notice_loss(self) -> None:
        """Makes it fail when the other machine's kernel is silent for :data:`LOST_AFTER`."""
        for option, value in (
            (socket.TCP_KEEPIDLE, LOST_AFTER // 2),
            (socket.TCP_KEEPINTVL, LOST_AFTER // 10),
            (socket.TCP_KEEPCNT, 5),
            (socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER),
        ):
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def close(self) -> None:
        """Closes the connection; a thread that waits in :meth:`receive` gets an OSError."""
        with contextlib.suppress(OSError):  # the other side has closed it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def split_address(address: str) -> tuple[str, int]:
    """The host and the port of `HOST:PORT`; an IPv6 address is in brackets there."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def connect(address: str, secret: bytes) -> AuthenticatedConnection:
    """Connects to a server that calls :func:`accept`.

    Args:
        address: `HOST:PORT`.
        secret: of the run.

    Raises:
        OSError: the server cannot be reached, or has closed the connection.
        AuthenticationError: the server does not know the secret.
        LinkError: it is no server of this protocol.
    """
    sock = socket.create_connection(split_address(address), CONNECT_TIMEOUT)
    try:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        ours = os.urandom(CHALLENGE)
        sock.sendall(MAGIC + ours)
        theirs = _challenge(sock, deadline, "no run of this version of rlhf-tui listens there")
        challenges = ours + theirs
        _check(_receive(sock, PROOF, deadline), secret, b"server proof", challenges)
        sock.sendall(_derive(secret, b"client proof", challenges))
        return _connection(sock, secret, challenges, b"client", b"server")
    except BaseException:
        sock.close()
        raise


def accept(sock: socket.socket, secret: bytes) -> AuthenticatedConnection:
    """Authenticates a client of :func:`connect`; reads at most 80 bytes from any other.

    Args:
        sock: a new connection; closed if this raises.
        secret: of the run.

    Raises:
        OSError: the connection is broken, or the client took too long.
        AuthenticationError: the client does not know the secret.
        LinkError: it is no client of this protocol.
    """
    try:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        theirs = _challenge(sock, deadline, "no client of this protocol")
        ours = os.urandom(CHALLENGE)
        challenges = theirs + ours
        sock.sendall(MAGIC + ours + _derive(secret, b"server proof", challenges))
        _check(_receive(sock, PROOF, deadline), secret, b"client proof", challenges)
        return _connection(sock, secret, challenges, b"server", b"client")
    except BaseException:
        sock.close()
        raise


def _connection(
    sock: socket.socket, secret: bytes, challenges: bytes, ours: bytes, theirs: bytes
) -> AuthenticatedConnection:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A machine that loses power closes no connection.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.settimeout(None)
    keys = [_derive(secret, side + b" frames", challenges) for side in (ours, theirs)]
    return AuthenticatedConnection(sock, keys[0], keys[1])


def _challenge(sock: socket.socket, deadline: float, otherwise: str) -> bytes:
    """Reads the other side's challenge. Raises LinkError with the text `otherwise` without one."""
    if _receive(sock, len(MAGIC), deadline) != MAGIC:
        raise LinkError(otherwise)
    return _receive(sock, CHALLENGE, deadline)


def _derive(secret: bytes, purpose: bytes, challenges: bytes) -> bytes:
    """Derives a proof or a key; purposes differ, so that one cannot be used as another."""
    return hmac.digest(secret, MAGIC + purpose + b"\0" + challenges, "sha256")


def _check(proof: bytes, secret: bytes, purpose: bytes, challenges: bytes) -> None:
    if not hmac.compare_digest(proof, _derive(secret, purpose, challenges)):
        raise AuthenticationError("the other machine has another secret")


def _frame_tag(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + body, "sha256")


def _receive(sock: socket.socket, count: int, deadline: float) -> bytes:
    """Receives bytes of a handshake; all its parts share one deadline."""
    data = bytearray()
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the other side did not prove itself in time")
        sock.settimeout(left)
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise ConnectionResetError("the other side closed the connection")
        data += chunk
    return bytes(data)
