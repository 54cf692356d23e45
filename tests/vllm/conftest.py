"""Tests with vLLM itself, in its own environment; skipped where that is not there."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from engine import starter
from engine.config import file as config_file
from engine.config.sections.rollout import RolloutConfig
from engine.launch.rollout.engine import (
    find_vllm,
    rollout_command,
    rollout_environment,
    rollout_python,
    shared_folder,
)
from engine.protocol import frames, sockets
from engine.protocol.rollout.messages import NextTurns, Progress, Start, decode_from_engine
from engine.session.temporary_folders import TemporaryFolder

START = 400
"""Seconds for an engine to start on a busy machine; 20 on an idle one."""
CONFIG = config_file.load(starter.FOLDER / "demo.yaml", ["rollout.engine=vllm",
                                                         "launch.device=cpu"])  # fmt: skip
PYTHON = rollout_python(CONFIG.rollout)


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(item.fspath).is_relative_to(Path(__file__).parent)]
    reason = None if find_vllm(PYTHON) else "vLLM is not installed here: make vllm"
    for item in here:
        item.add_marker(pytest.mark.vllm)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


class Engine:
    """An engine's process with its client's end of the socket."""

    def __init__(self, folder: Path, start: Start) -> None:
        self.shared = TemporaryFolder(shared_folder())
        listener, path = sockets.listen(folder, sockets.ROLLOUT_NAME)
        with (folder / "rollout.log").open("wb") as log, listener:
            self.process = subprocess.Popen(
                rollout_command(RolloutConfig(engine="vllm"), listener.fileno(), folder),
                env=rollout_environment(CONFIG) | {"RLHF_TUI_PARENT": str(os.getpid())},
                stdout=log, stderr=log, pass_fds=[listener.fileno()], start_new_session=True,
            )  # fmt: skip
            self.socket: socket.socket = sockets.connect(path)
        self.socket.settimeout(START)
        self.ready = self.ask(start)

    def ask(self, message):
        """Sends a message; returns its reply."""
        self.socket.sendall(frames.encode(message))
        return decode_from_engine(frames.receive(self.socket))

    def generate(self, request, turns, look=lambda _progress: []):
        """Returns the ended turns. `look` says which rows to stop at each progress."""
        ended, waiting = {}, turns
        reply = self.ask(request)
        while isinstance(reply, Progress):
            ended |= {turn.row: turn for turn in reply.ended}
            last = len(ended) == len(turns)
            reply = self.ask(NextTurns(turns=waiting, stop=look(reply), last=last))
            waiting = []
        assert reply.weights_version == request.weights_version
        return [ended[row] for row in sorted(ended)]

    def end(self) -> int:
        """Disconnects; returns the exit status of the process."""
        self.socket.close()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.shared.close()


START_MESSAGE = Start(
    model=str(starter.FOLDER / "policy"), dtype="float32", max_tokens=240, max_responses=64,
    cache_bytes=64 << 20,
)  # fmt: skip


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory):
    """Returns a function that starts an engine with the starter's model; ends them all."""
    engines = []

    def start(message=START_MESSAGE):
        engines.append(Engine(tmp_path_factory.mktemp("engine"), message))
        return engines[-1]

    yield start
    for engine in engines:
        engine.end()
