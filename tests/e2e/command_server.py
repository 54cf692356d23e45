"""Runs commands of `rlhf-tui` in processes that are forked from one that has imported them.

The start of Python and its imports are most of the processor time of a short command, and the same
for all. What a command does is done by a process of its own, with the environment, the output and
the exit code that it would have anyway.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf_tui.cli import MODULES, main

NOT_LOADED = {"view", "integration.mcp"}
"""Modules of commands that are not short."""
SERVER = "from tests.e2e.command_server import run_server; run_server()"
"""Not `-m`: click would take that for the name of the program."""
ROOT = Path(__file__).parents[2]
LONGEST_REQUEST = 1 << 17


class CommandServer:
    """The client's side: starts the server, and has it run one command at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(theirs.fileno())],
                cwd=ROOT, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip

    def run(
        self, arguments: list[str], environment: dict[str, str], timeout: float
    ) -> "subprocess.CompletedProcess[str]":
        """Like :func:`subprocess.run` with the output captured as text, and without input."""
        with self._lock, ThreadPoolExecutor(2) as readers:
            (stdout, for_stdout), (stderr, for_stderr) = os.pipe(), os.pipe()
            request = json.dumps([arguments, environment, str(Path.cwd())]).encode()
            socket.send_fds(self._sock, [request], [for_stdout, for_stderr])
            os.close(for_stdout)
            os.close(for_stderr)
            texts = [readers.submit(read_to_end, fd) for fd in (stdout, stderr)]
            pid = int(self._sock.recv(64))
            self._sock.settimeout(timeout)
            try:
                code = int(self._sock.recv(64))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._sock.settimeout(None)
                self._sock.recv(64)
                raise subprocess.TimeoutExpired(arguments, timeout) from None
            self._sock.settimeout(None)
            # A pipe ends when every process that has it has closed it or ended.
            return subprocess.CompletedProcess(arguments, code, *[t.result() for t in texts])

    def close(self) -> None:
        """Ends the server."""
        self._sock.close()
        self._process.wait()


def read_to_end(fd: int) -> str:
    """What is written to a pipe; closes it."""
    with open(fd, encoding="utf-8") as file:
        return file.read()


def serve(sock: socket.socket) -> None:
    """Forks a process for each request until the client is gone; returns in each of them only."""
    while True:
        request, outputs, _, _ = socket.recv_fds(sock, LONGEST_REQUEST, 2)
        if not request:
            os._exit(0)
        if (pid := os.fork()) == 0:
            sock.close()
            begin(*json.loads(request), outputs)
            return
        for fd in outputs:
            os.close(fd)
        sock.send(str(pid).encode())
        sock.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def begin(
    arguments: list[str], environment: dict[str, str], folder: str, outputs: list[int]
) -> None:
    """Makes this process what a shell would have started."""
    for number, fd in enumerate(outputs, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["rlhf-tui", *arguments]


def run_server() -> None:
    """What the server does with the number of an open socket as its argument."""
    for name in set(MODULES.values()) - NOT_LOADED:
        importlib.import_module(f"rlhf_tui.commands.{name}")
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
    main()
