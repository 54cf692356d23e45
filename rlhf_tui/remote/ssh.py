"""Runs programs on other machines by `ssh`: no port is opened, and SSH's own settings apply."""

import os
import re
import shlex
import subprocess
import tempfile
import threading
import time

from msgspec import Struct

from engine.errors import LinkError, NoSuchSessionError, UserInputError, shortened
from engine.session.command_line import mark_copies
from engine.session.temporary_folders import TemporaryFolder
from rlhf_tui import format as fmt
from rlhf_tui.remote.copy import SessionCopy
from rlhf_tui.remote.messages import Done, decode

_ADDRESS = re.compile(r"ssh://(?P<host>[^/:\s]+)(:(?P<port>\d+))?(/(?P<name>[^/\s]*))?")
PROGRAM_VARIABLE = "RLHF_TUI_REMOTE"
"""Environment variable with the program's name on other machines, if not `rlhf-tui` on the PATH."""
RECONNECT_INTERVAL = 5.0
"""Seconds between two attempts to connect again."""
POLL_INTERVAL = 0.05
"""Seconds between two checks of a connection that is being established."""
JOIN_TIMEOUT = 5.0
"""Seconds for the thread to end once the connections are closed."""
SILENCE_TIMEOUT = 30.0
"""Seconds without a message after which a connection counts as broken: three heartbeats."""
FIRST_COPY_TIMEOUT = 60.0
"""Seconds that the first copy may take: somebody may have to type a passphrase."""


class Address(Struct, frozen=True):
    """`ssh://[USER@]HOST[:PORT][/NAME]`."""

    host: str
    port: str = ""
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises UserInputError."""
        found = _ADDRESS.fullmatch(text)
        # ssh would take a host that begins with a dash for an option.
        if found is None or found["host"].startswith("-"):
            raise UserInputError(f"'{text}' is not an address: use ssh://[USER@]HOST[:PORT][/NAME]")
        return cls(found["host"], found["port"] or "", found["name"] or "")

    def __str__(self) -> str:
        port = f":{self.port}" if self.port else ""
        return f"ssh://{self.host}{port}/{self.name}"

    def ssh(self, *options: str) -> list[str]:
        """The command line of ssh, to which a command for the other machine can be appended."""
        port = ["-p", self.port] if self.port else []
        return ["ssh", *port, *options, self.host]

    def command(self, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command line that runs rlhf-tui there."""
        program = os.environ.get(PROGRAM_VARIABLE) or "rlhf-tui"
        return [*self.ssh("-T", *options), "--", f"{program} {shlex.join(arguments)}"]


def run(address: Address, *arguments: str) -> bytes:
    """Runs a command of rlhf-tui on another machine and returns its output.

    Raises:
        LinkError: it failed, or ssh did; the message has the last line of the error output.
    """
    command = address.command(*arguments)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)  # noqa: S603 - ssh with the user's own address
    except OSError as error:
        raise LinkError(f"cannot run ssh: {error.strerror}") from error
    if done.returncode:
        raise LinkError(f"{address.host}: {_last_line(done.stderr, done.returncode)}")
    return done.stdout


def _last_line(output: bytes, code: int) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return shortened(lines[-1], 300) if lines else f"ssh ended with exit code {code}"


def _forwarded(path: str) -> str:
    """A path of a socket as `ssh -L` takes it.

    ssh would replace `${NAME}` by a variable of this machine's environment and send the other one
    the result, which may be a secret. There is no way to write it so that it stays.

    Raises:
        LinkError: the path contains it.
    """
    if "${" in path:
        raise LinkError("the path of the engine's socket contains ${, which ssh cannot forward")
    return re.sub(r"([\\:])", r"\\\1", path).replace("%", "%%")


class RemoteSession:
    """A session on another machine: its copy, kept up to date, and its engine's socket.

    Attributes:
        root: the private folder that holds the copy. Deleted at the end; if this process is
            killed, deleted when the next such folder is created.
    """

    def __init__(self, address: Address, arguments: list[str]) -> None:
        """Starts nothing yet.

        Args:
            address: the address, including the name of the session.
            arguments: arguments of the command on that machine that sends the session.
        """
        self._address = address
        self._arguments = arguments
        self._folder = TemporaryFolder()
        self.root = self._folder.path
        mark_copies(self.root)
        self._socket = self.root / ".s"  # no session has this name
        self._copy = SessionCopy(self.root, self._socket)
        self._source: subprocess.Popen[bytes] | None = None
        self._forward: subprocess.Popen[bytes] | None = None
        self._forwarded: str | None = None
        self._not_forwarded = ""
        """Why the engine's socket is not forwarded; the session can be read all the same."""
        self._first = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="remote session")
        self._problem: Exception | None = None
        """Why the connection has ended; None while there is one."""
        self._updated: float | None = None
        """When the copy was last known to be up to date; None before the first copy."""
        self._heard = 0.0
        """The same by the monotonic clock, since the wall clock may be set."""

    def __enter__(self) -> "RemoteSession":
        """Waits for the first copy.

        Raises:
            LinkError: ssh failed, or the command on the other machine.
            NoSuchSessionError: there is no such session.
        """
        self._thread.start()
        try:
            ready = self._first.wait(FIRST_COPY_TIMEOUT)
        except BaseException:
            self.close()
            raise
        if not ready or self._updated is None:
            problem = self._problem or LinkError(f"{self._address.host} does not answer")
            self.close()
            raise problem
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """The address of the session."""
        return str(self._address)

    @property
    def stale(self) -> str:
        """What is missing at the moment: why the copy is not kept up to date, or read only."""
        problem, updated = self._problem, self._updated
        if updated is None:
            return ""
        if problem is not None:
            return f"not updated since {fmt.time_of_day(updated)}, connecting again: {problem}"
        if time.monotonic() - self._heard > SILENCE_TIMEOUT:
            return f"{self._address.host} has sent nothing since {fmt.time_of_day(updated)}"
        return self._not_forwarded

    @property
    def name(self) -> str:
        """The name of the session."""
        return self._copy.session.name if self._copy.session is not None else self._address.name

    def close(self) -> None:
        """Ends the connections and deletes the copy."""
        self._stopped.set()
        end = time.monotonic() + JOIN_TIMEOUT
        # The thread may be starting a process, or writing into the copy.
        while self._thread.is_alive() and time.monotonic() < end:
            self._terminate()
            self._thread.join(POLL_INTERVAL)
        for process in self._terminate():
            process.wait()
        self._copy.close()
        self._folder.close()

    def _terminate(self) -> list[subprocess.Popen[bytes]]:
        processes = [p for p in (self._source, self._forward) if p is not None]
        for process in processes:
            process.terminate()
        return processes

    # -- in the thread -------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._stopped.is_set():
            try:
                self._receive()
            except Exception as error:  # shown to the user, see `stale`
                self._problem = error
            if not self._first.is_set():
                self._first.set()  # the first connection failed: raised, and not repeated
                return
            self._stopped.wait(RECONNECT_INTERVAL)

    def _receive(self) -> None:
        """Copies the session until the connection ends, which always is an error.

        Raises:
            NoSuchSessionError: there is no such session.
            LinkError: ssh has ended, or its output is not a message.
            SessionError: the copy cannot be locked.
            sqlite3.Error, OSError: the copy cannot be written.
        """
        command = self._address.command(*self._arguments, options=self._batch_options())
        with tempfile.TemporaryFile() as errors:
            try:
                self._source = source = subprocess.Popen(  # noqa: S603 - ssh with the user's own address
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
                )
            except OSError as error:
                raise LinkError(f"cannot run ssh: {error.strerror}") from error
            try:
                for line in source.stdout or ():
                    message = decode(line)
                    self._copy.take(message)
                    if isinstance(message, Done):
                        self._forward_socket()
                        self._heard = time.monotonic()
                        self._updated, self._problem = time.time(), None
                        self._first.set()
                code = source.wait()
            finally:  # after an error nobody reads what it sends
                source.terminate()
            errors.seek(0)
            text = _last_line(errors.read(), code).removeprefix("rlhf-tui: ")
            kind = NoSuchSessionError if code == NoSuchSessionError.exit_code else LinkError
            raise kind(f"{self._address.host}: {text}")

    def _batch_options(self) -> tuple[str, ...]:
        """Options of ssh: it must not ask for a passphrase once the app has the terminal."""
        return ("-o", "BatchMode=yes") if self._first.is_set() else ()

    def _forward_socket(self) -> None:
        """Forwards the engine's socket; does so again if its path has changed."""
        remote = self._copy.remote_socket
        running = self._forward is not None and self._forward.poll() is None
        if remote == self._forwarded and (running or remote is None):
            return
        if self._forward is not None:
            self._forward.terminate()
            self._forward.wait()
            self._forward = None
        self._forwarded, self._not_forwarded = remote, ""
        if remote is not None:
            try:
                sockets = f"{_forwarded(str(self._socket))}:{_forwarded(remote)}"
            except LinkError as error:
                self._not_forwarded = f"no commands can be sent: {error}"
                return
            self._socket.unlink(missing_ok=True)
            options = (
                "-T",
                *self._batch_options(),
                "-o",
                "ExitOnForwardFailure=yes",
                "-L",
                sockets,
            )
            # `cat` ends with this process, however it ends: then its input is closed.
            self._forward = subprocess.Popen(  # noqa: S603 - ssh with the user's own address
                [*self._address.ssh(*options), "--", "cat"], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            # It may ask for a passphrase until it is connected: the app must not have begun.
            while not (
                self._first.is_set()
                or self._stopped.is_set()
                or self._socket.exists()
                or self._forward.poll() is not None
            ):
                self._stopped.wait(POLL_INTERVAL)
