"""The key-value store of a run over several machines, at `launch.rendezvous` of the first one.

It replaces torch's `TCPStore`, which anybody who reaches its port can read and write. Here at most
80 bytes are read from a client before it has proved that it knows the secret of the run
(:mod:`engine.protocol.machines.authentication`).
"""

import contextlib
import errno
import ipaddress
import logging
import socket
import threading
import time
from typing import assert_never

import msgspec

from engine.errors import LinkError
from engine.protocol.machines.authentication import AuthenticatedConnection, accept, split_address
from engine.protocol.machines.store_messages import (
    AddToKey,
    AppendToKey,
    CheckKeys,
    CompareAndSetKey,
    CountKeys,
    DeleteKey,
    GetKeys,
    SetKeys,
    StoreReply,
    StoreRequest,
    decode_request,
)

log = logging.getLogger("engine")

MAX_HANDSHAKES = 64
"""Maximum number of simultaneous handshakes; other clients are turned away and try again."""
BACKLOG = 1024
"""Maximum number of connections waiting to be accepted: all ranks connect at once."""
MAX_WARNINGS = 20
"""Maximum number of refused clients that are logged: a port scanner must not fill the log."""


class KeyValues:
    """The keys and values. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._waiting: dict[str, list[threading.Event]] = {}

    def handle(self, request: StoreRequest) -> StoreReply:
        """Carries out a request; blocks while it waits for keys."""
        match request:
            case GetKeys(keys=keys, seconds=seconds, values=wanted):
                if missing := self._wait(keys, seconds):
                    return StoreReply(missing=missing)
                with self._lock:
                    values = [self._values.get(k, b"") for k in keys] if wanted else []
                return StoreReply(values=values)
            case CheckKeys(keys=keys):
                with self._lock:
                    return StoreReply(number=int(all(k in self._values for k in keys)))
            case CountKeys():
                with self._lock:
                    return StoreReply(number=len(self._values))
            case DeleteKey(key=key):
                with self._lock:
                    return StoreReply(number=int(self._values.pop(key, None) is not None))
            case _:
                return self._change(request)

    def _change(self, request: SetKeys | AddToKey | AppendToKey | CompareAndSetKey) -> StoreReply:
        with self._lock:
            changed: dict[str, bytes] = {}
            reply = StoreReply()
            match request:
                case SetKeys(values=values):
                    changed = values
                case AppendToKey(key=key, value=value):
                    changed = {key: self._values.get(key, b"") + value}
                case AddToKey(key=key, amount=amount):
                    try:
                        total = int(self._values.get(key, b"0")) + amount
                    except ValueError:
                        return StoreReply(error=f"the value of {key} is not a number")
                    changed = {key: str(total).encode()}
                    reply = StoreReply(number=total)
                case CompareAndSetKey(key=key, expected=expected, desired=desired):
                    found = self._values.get(key)
                    if found == expected or (found is None and not expected):
                        changed, found = {key: desired}, desired
                    reply = StoreReply(values=[expected if found is None else found])
                case _:
                    assert_never(request)
            self._values |= changed
            for key in changed:
                for event in self._waiting.pop(key, []):
                    event.set()
            return reply

    def _wait(self, keys: list[str], seconds: float) -> str | None:
        """Waits until all keys exist; returns one that is still missing at the end, or None."""
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                missing = next((k for k in keys if k not in self._values), None)
                if missing is None:
                    return None
                event = threading.Event()
                self._waiting.setdefault(missing, []).append(event)
            if not event.wait(max(0.0, deadline - time.monotonic())):
                with self._lock, contextlib.suppress(KeyError, ValueError):
                    self._waiting[missing].remove(event)
                    if not self._waiting[missing]:
                        del self._waiting[missing]
                return missing


class StoreServer:
    """Serves :class:`KeyValues` to clients that know the secret, each in a thread of its own."""

    def __init__(self, address: str, secret: bytes) -> None:
        """Listens, and serves in the background until :meth:`close` or the process ends.

        Args:
            address: `HOST:PORT`. If HOST is an IP address of this machine, the server listens on
                that interface only. A name may resolve to an interface other than the one that
                others use, so it then listens on all.
            secret: of the run.

        Raises:
            OSError: the port is in use.
        """
        self.values = KeyValues()
        """The content."""
        self._secret = secret
        self._refused = 0
        self._handshakes = threading.BoundedSemaphore(MAX_HANDSHAKES)
        self._lock = threading.Lock()
        self._connections: set[AuthenticatedConnection] = set()
        self._closed = False
        self._listener = listen_at(address)
        self.port: int = self._listener.getsockname()[1]
        """Where it listens."""
        threading.Thread(target=self._accept, name="store", daemon=True).start()

    def close(self) -> None:
        """Ends the server and all its connections."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        with contextlib.suppress(OSError):  # wakes the thread that waits in `accept`
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in connections:
            connection.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, peer = self._listener.accept()
            except OSError:  # closed, or out of file descriptors for a while
                time.sleep(0.1)
                continue
            if not self._handshakes.acquire(blocking=False):
                sock.close()
                continue
            serving = threading.Thread(target=self._serve, args=(sock, peer[0]), daemon=True)
            try:
                serving.start()
            except RuntimeError as error:  # no further thread for a while; the client tries again
                self._handshakes.release()
                sock.close()
                self._warn(peer[0], error)

    def _serve(self, sock: socket.socket, peer: str) -> None:
        """Serves one client to its end."""
        try:
            try:
                connection = accept(sock, self._secret)
            finally:
                self._handshakes.release()
        except (OSError, LinkError) as error:
            self._warn(peer, error)
            return
        with self._lock:
            self._connections.add(connection)
        try:
            with connection:
                while not self._closed:
                    reply = self.values.handle(decode_request(connection.receive()))
                    connection.send(msgspec.msgpack.encode(reply))
        except OSError:
            pass  # the client has gone; who misses it notices
        except LinkError as error:
            self._warn(peer, error)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _warn(self, peer: str, error: Exception) -> None:
        with self._lock:
            self._refused += 1
            if self._closed or self._refused > MAX_WARNINGS:
                return
        log.warning("launch.rendezvous: refused a connection from %s: %s", peer, error)


def listen_at(address: str) -> socket.socket:
    """Opens a listening socket at `HOST:PORT`, see :class:`StoreServer`. Raises OSError."""
    host, port = split_address(address)
    family: socket.AddressFamily | None = None
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        family = socket.AF_INET6 if version == 6 else socket.AF_INET
    if family is not None:
        try:
            return socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            # Not every address of a machine is that of an interface (NAT, a floating address).
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
            )
    return socket.create_server(("", port), backlog=BACKLOG)
