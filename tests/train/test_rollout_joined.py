"""Rollouts by an engine on a joined machine: what rank 0, the relay and that machine say.

The engine is a stand-in, and both machines are this process; tests/vllm has the same with vLLM.
"""

import contextlib
import os
import threading
from pathlib import Path

import pytest
import torch

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.rollout import RolloutConfig
from engine.errors import LinkError
from engine.launch.environment import ROLLOUT_FOLDER_VARIABLE, rollout_socket_variable
from engine.launch.rollout.join import find_run, serve, with_paths
from engine.launch.rollout.port import wait_for_machine
from engine.launch.rollout.received_files import ReceivedFiles
from engine.launch.rollout.relay import MachineLostError, relay
from engine.launch.store_server import listen_at
from engine.protocol import sockets
from engine.protocol.rollout.join_messages import (
    WEIGHTS,
    FilePart,
    RolloutJoinInfo,
    rollout_secret,
)
from engine.protocol.rollout.messages import (
    EngineFailed,
    Generate,
    LoadWeights,
)
from engine.protocol.rollout.server import first_client, report
from engine.train.step import train_step
from tests.train.repeating import ENVIRONMENT, STOPS, respond
from tests.train.stand_in_engine import StandInEngine

SECRET = "a secret of one run"  # noqa: S105 - of a test
INFO = RolloutJoinInfo(session="s", launch=LaunchConfig(), rollout=RolloutConfig())


@pytest.fixture
def joined_engine(engine, tmp_path, monkeypatch):
    """A stand-in for the second of two engines, on a machine that has joined; `engine` is here."""
    folder = tmp_path / "there"
    folder.mkdir()
    there = StandInEngine(folder, monkeypatch, 9)
    there_path = Path(os.environ[rollout_socket_variable(9)])
    monkeypatch.setenv(ROLLOUT_FOLDER_VARIABLE, str(engine.folder))
    listener, path = sockets.listen(tmp_path / "engine", sockets.rollout_name(1))
    monkeypatch.setenv(rollout_socket_variable(1), str(path))
    secret = tmp_path / "join.secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    port = listen_at("127.0.0.1:0")
    address = f"127.0.0.1:{port.getsockname()[1]}"

    def first_machine():
        while True:
            try:
                machine, name = wait_for_machine(port, rollout_secret(SECRET), INFO)
                client, start = first_client(listener)
            except (OSError, ValueError):  # the test is over
                return
            with contextlib.suppress(OSError), machine:
                try:
                    relay(client, start, machine)
                except MachineLostError as error:
                    report(client, EngineFailed(text=f"{name} is lost: {error}"))

    def other_machine():
        while secret.exists():
            try:
                machine, _ = find_run(address, secret, 60.0, joined=False)
            except LinkError:  # the test is over
                return
            with (
                machine,
                contextlib.closing(ReceivedFiles()) as files,
                sockets.connect(there_path) as connection,
            ):
                connection.settimeout(None)
                serve(machine, connection, files)

    for run in (first_machine, other_machine):
        threading.Thread(target=run, daemon=True).start()
    yield there
    secret.unlink()
    for each in (listener, port, there.listener):
        each.close()


def test_an_engine_on_another_machine_generates_its_part_and_is_replaced_when_it_is_lost(
    make_run, engine, joined_engine
):
    seen = []

    def dies_at_its_first_responses(message):
        seen.append(message)
        if isinstance(message, Generate):
            raise ConnectionError

    joined_engine.faults = iter([dies_at_its_first_responses, seen.append])
    run, _ = make_run("rollout.engine=vllm", "rollout.engines=2", "rollout.joined=1",
                      "rollout.rendezvous=127.0.0.1:1")  # fmt: skip
    native, _ = make_run()
    for step in (1, 2):
        (ours, samples), (_, expected) = train_step(run, step), train_step(native, step)
        assert [s.response for s in samples] == [s.response for s in expected]
        assert ours["rollout/version_lag"] == 0
        run.state.step = step
    assert (engine.engines, joined_engine.engines) == (1, 2)
    assert (engine.rows, joined_engine.rows) == ([4, 4], [4, 4])
    updates = [m for m in seen if isinstance(m, LoadWeights)]
    assert [u.weights_version for u in updates] == [0, 0, 1]
    assert not any(u.path.startswith(str(engine.folder)) for u in updates)  # files of their own


def test_an_engine_on_another_machine_takes_turns_of_responses_that_do_not_wait_for_each_other(
    make_run, engine, joined_engine
):
    run, _ = make_run(*ENVIRONMENT, STOPS, "rollout.engine=vllm", "environment.turns=independent",
                      "rollout.engines=2", "rollout.joined=1",
                      "rollout.rendezvous=127.0.0.1:1")  # fmt: skip
    native, _ = make_run(*ENVIRONMENT, STOPS)
    ours, theirs = respond(run), respond(native)
    assert torch.equal(ours.ids, theirs.ids)
    assert sum(map(len, joined_engine.turns)) >= 4


# -- what a joined machine takes -------------------------------------------------------------------


def part(name, data=b"abc", offset=0, size=6):
    return FilePart(name=name, offset=offset, size=size, data=data)


def test_files_are_put_together_from_their_parts_and_a_new_one_replaces_the_last():
    with contextlib.closing(ReceivedFiles()) as files:
        for content in (b"abcdef", b"ghijkl"):
            files.write(part(WEIGHTS, content[:3]))
            files.write(part(WEIGHTS, content[3:], 3))
            assert files.weights.read_bytes() == content
        files.write(part("config.json", b"{}", size=2))
        assert (files.model / "config.json").read_bytes() == b"{}"
        folders = [files.weights.parent, files.model]
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("name", ["../x.json", "/tmp/x.json", "a.py", ".json", "weights", ""])  # noqa: S108
def test_a_file_that_is_none_of_a_model_is_refused(name):
    with (
        contextlib.closing(ReceivedFiles()) as files,
        pytest.raises(LinkError, match="is not a file of a model"),
    ):
        files.write(part(name))


@pytest.mark.parametrize(
    "parts",
    [[part(WEIGHTS, offset=3)], [part(WEIGHTS), part(WEIGHTS, offset=4)], [part(WEIGHTS)] * 2],
    ids=["no beginning", "a gap", "twice"],
)
def test_parts_that_are_not_in_order_are_refused(parts):
    with contextlib.closing(ReceivedFiles()) as files, pytest.raises(LinkError):
        for each in parts:
            files.write(each)


def test_an_engine_is_given_no_pickles_and_no_paths_of_the_first_machine():
    update = LoadWeights(weights_version=1, path="/etc/passwd", tensors=[], checksum=(1, 1))
    with contextlib.closing(ReceivedFiles()) as files:
        with pytest.raises(LinkError):  # nothing has been sent
            with_paths(update, files)
        files.write(part(WEIGHTS, size=3))
        assert with_paths(update, files).path == str(files.weights)
        for transfer in ("ipc", "broadcast"):
            with pytest.raises(LinkError):
                with_paths(
                    LoadWeights(weights_version=1, path="", tensors=[], checksum=None,
                                transfer=transfer, handles=b"pickle"), files,
                )  # fmt: skip
        with pytest.raises(LinkError):
            with_paths(EngineFailed(text="no message to an engine"), files)
