"""The supervisor keeps a rollout engine alive, and says when it cannot."""

import asyncio
import contextlib
import functools
import os
import select
import signal
import socket
import sqlite3
from pathlib import Path

import psutil
import pytest

from engine import starter
from engine.config import file as config_file
from engine.errors import LinkError, UserInputError
from engine.launch.environment import (
    ROLLOUT_DISK_VARIABLE,
    ROLLOUT_FOLDER_VARIABLE,
    ROLLOUT_SOCKET_VARIABLE,
    TF32_OVERRIDE,
    rollout_socket_variable,
)
from engine.launch.rollout import engine as launch
from engine.launch.rollout import join as rollout_join
from engine.launch.rollout import port
from engine.launch.secret import SECRET_VARIABLE
from engine.launch.start_options import StartOptions
from engine.protocol import frames, sockets
from engine.protocol.rollout.join_messages import Joined, rollout_secret
from engine.protocol.rollout.messages import EngineFailed, Start, decode_from_engine
from engine.session.folder import create
from engine.supervisor.attempt import Attempt
from engine.supervisor.processes.rollout_engines import RolloutEngines
from engine.supervisor.state import SupervisorState
from tests.engine.supervised import until

DEADLINE = 30.0
SECRET = "a secret of one run"  # noqa: S105 - of a test


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def make(tmp_path):
    """Returns a function that makes the engines of a session; their "Python" is a shell script."""

    def made(
        script="exec sleep 1000", engine="vllm", restarts=2, error=None, engines=1, joined=False
    ):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        keys = [f"rollout.engine={engine}", f"rollout.python={python}",
                f"rollout.engines={engines}", f"launch.max_restarts={restarts}",
                "launch.device=cpu"]  # fmt: skip
        if joined:
            keys += ["rollout.joined=1", f"rollout.rendezvous=127.0.0.1:{free_port()}"]
        config = config_file.load(starter.FOLDER / "demo.yaml", keys)
        state = SupervisorState(settings={}, attempt=Attempt(StartOptions()), next=None)
        said = []

        def restarted(text):
            if error is not None:
                raise error
            said.append(("restart", text))

        engines_of = RolloutEngines(
            create(tmp_path, "s", config), config, state, SECRET,
            on_restart=restarted,
            on_failure=lambda text: said.append(("failure", text)),
        )  # fmt: skip
        return engines_of, state, said

    return made


async def test_native_rollouts_start_nothing(make):
    engines, _, _ = make(engine="native")
    assert await engines.start() == {}
    assert engines.processes == []


async def test_an_engine_that_is_killed_is_started_again_and_ends_with_the_attempt(make):
    engines, _, said = make()
    variables = await engines.start()
    (process,) = engines.processes
    path, folder, disk = (
        Path(variables[name])
        for name in (ROLLOUT_SOCKET_VARIABLE, ROLLOUT_FOLDER_VARIABLE, ROLLOUT_DISK_VARIABLE)
    )
    sockets.connect(path).close()  # before any engine answers
    assert folder.stat().st_mode & 0o777 == disk.stat().st_mode & 0o777 == 0o700
    assert path.with_name("rollout.log").stat().st_mode & 0o777 == 0o600
    first = process.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: process.pid not in (None, first))
    assert [kind for kind, _ in said] == ["restart"]
    assert "SIGKILL" in said[0][1]
    second = process.pid
    await engines.stop()
    assert not psutil.pid_exists(second)
    assert not path.exists()
    assert not folder.exists()
    assert not disk.exists()


async def test_of_several_engines_each_is_started_again_by_itself_and_has_its_own_files(make):
    engines, state, said = make(engines=2)
    variables = await engines.start()
    sockets_of = [Path(variables[rollout_socket_variable(i)]) for i in range(2)]
    assert [s.name for s in sockets_of] == ["rollout.sock", "rollout-1.sock"]
    assert all(sockets_of[0].with_name(name).exists() for name in ("rollout.log", "rollout-1.log"))
    first, second = (p.pid for p in engines.processes)
    os.kill(second, signal.SIGKILL)
    await until(lambda: engines.processes[1].pid not in (None, second))
    assert [said[0][0], said[0][1][:34]] == ["restart", "rollout engine 1 was ended by SIGK"]
    assert state.rollout_restarts == {1: 1}
    assert engines.processes[0].pid == first
    pids = [p.pid for p in engines.processes]
    await engines.stop()
    assert not any(map(psutil.pid_exists, pids))
    assert not any(s.exists() for s in sockets_of)


async def test_engines_that_end_again_and_again_within_a_step_fail_the_attempt(make):
    engines, _, said = make(script="exit 3")
    await engines.start()
    await until(lambda: said and said[-1][0] == "failure")
    assert [kind for kind, _ in said] == ["restart", "restart", "failure"]
    assert "ended with status 3, again; see" in said[-1][1]
    await engines.stop()


async def test_a_program_that_always_ends_without_an_error_fails_the_attempt(make):
    engines, _, said = make(script="exit 0")
    await engines.start()
    await until(lambda: said)
    ((kind, text),) = said
    assert kind == "failure"
    assert "the rollout engine ended with status 0, again; see" in text
    await engines.stop()


async def test_an_engine_is_started_again_although_the_journal_cannot_be_written(make):
    engines, _, said = make(script="exit 3", error=sqlite3.OperationalError("disk is full"))
    await engines.start()
    await until(lambda: said)
    assert [kind for kind, _ in said] == ["failure"]
    assert "ended with status 3, again; see" in said[0][1]
    await engines.stop()


async def test_an_engine_that_is_no_longer_watched_fails_the_attempt(make):
    engines, _, said = make(script="exit 3", error=KeyError("rule"))
    await engines.start()
    await until(lambda: said)
    assert said == [("failure", "the rollout engine is no longer watched: KeyError: 'rule'")]
    await engines.stop()


def secret_file(folder, secret):
    file = folder / "join.secret"
    file.write_text(secret)
    file.chmod(0o600)
    return file


async def test_a_machine_that_knows_the_secret_takes_the_place_of_an_engine(
    make, tmp_path, monkeypatch
):
    monkeypatch.setattr(rollout_join, "RETRY_INTERVAL", 0.05)
    engines, _, said = make(joined=True)
    engines.listen()
    address = f"127.0.0.1:{engines.port}"
    await engines.start()
    monkeypatch.setenv(SECRET_VARIABLE, "the secret of another run")
    with pytest.raises(UserInputError, match="another secret"):
        await asyncio.to_thread(rollout_join.find_run, address, None, DEADLINE, joined=False)
    stranger = socket.create_connection(("127.0.0.1", engines.port))
    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    file = secret_file(tmp_path, SECRET)
    machine, info = await asyncio.to_thread(
        rollout_join.find_run, address, file, DEADLINE, joined=False
    )
    assert info.session == "s"
    stranger.settimeout(DEADLINE)
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(100) == b""
    machine.close()
    # Rank 0 begins, and the relay notices that the machine is gone.
    with sockets.connect(tmp_path / "s" / "rollout.sock") as rank_0:
        start = Start(model=str(tmp_path), dtype="float32", max_tokens=1, max_responses=1,
                      cache_bytes=1)  # fmt: skip
        rank_0.sendall(frames.encode(start))
        reply = decode_from_engine(await asyncio.to_thread(frames.receive, rank_0))
    assert isinstance(reply, EngineFailed)
    assert "is lost" in reply.text
    await until(lambda: said)
    assert said[0][1] == "the rollout engine ended with status 3: another one is started"
    file.unlink()
    with pytest.raises(rollout_join.RunOverError):
        rollout_join.find_run(address, file, 1.0, joined=True)
    # Where the secret is not the session's own file, the first machine says that the run is over.
    secret_file(tmp_path / "s", SECRET)
    copy = secret_file(tmp_path, SECRET)
    await engines.stop()
    joining = asyncio.to_thread(rollout_join.find_run, address, copy, DEADLINE, joined=True)
    ended, closed = await asyncio.gather(joining, engines.close(), return_exceptions=True)
    assert isinstance(ended, rollout_join.RunOverError)
    assert closed is None


async def test_a_machine_that_has_generated_learns_of_the_end_although_another_one_waits(
    monkeypatch,
):
    monkeypatch.setattr(rollout_join, "RETRY_INTERVAL", 0.05)
    monkeypatch.setattr(port, "END_TIMEOUT", DEADLINE)
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def find(wait, joined):
            return asyncio.create_task(
                asyncio.to_thread(rollout_join.find_run, address, None, wait, joined=joined)
            )

        waiting = find(0.1, joined=False)
        await until(lambda: select.select([listener], [], [], 0)[0])
        generated = find(DEADLINE, joined=True)
        await asyncio.to_thread(port.announce_end, listener, rollout_secret(SECRET), 1)
    with pytest.raises(rollout_join.RunOverError):
        await generated
    with pytest.raises(LinkError):
        await waiting


async def test_a_machine_of_another_version_is_refused_with_the_reason(make, tmp_path, monkeypatch):
    monkeypatch.setattr(port, "END_TIMEOUT", 0.0)
    monkeypatch.setattr(rollout_join, "Joined", functools.partial(Joined, software="0.0"))
    engines, _, _ = make(joined=True)
    engines.listen()
    await engines.start()
    file = secret_file(tmp_path, SECRET)
    with pytest.raises(UserInputError, match=r"this machine 0\.0: install the same"):
        await asyncio.to_thread(
            rollout_join.find_run, f"127.0.0.1:{engines.port}", file, DEADLINE, joined=False
        )
    await engines.close()


def test_an_engine_does_not_inherit_what_rounds_its_products(monkeypatch):
    monkeypatch.setenv(TF32_OVERRIDE, "1")
    config = config_file.load(starter.FOLDER / "demo.yaml", ["rollout.engine=vllm"])
    assert TF32_OVERRIDE not in launch.rollout_environment(config)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["rollout.gpus=[5, 7]", "rollout.engines=2"], ["5", "7"]),
        (["rollout.gpus=[4, 5, 6, 7]", "rollout.engines=2", "rollout.tensor_parallel=2"],
         ["4,5", "6,7"]),
        (["launch.gpus=[2, 3]", "rollout.engines=2"], ["2", "3"]),
        (["rollout.engines=2"], ["0", "1"]),
        (["rollout.engines=2", "launch.device=cpu"], ["", ""]),
    ],
)  # fmt: skip
def test_each_engine_has_its_own_gpus_in_order(monkeypatch, keys, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "gpu_count", lambda: 4)
    config = config_file.load(starter.FOLDER / "demo.yaml", ["rollout.engine=vllm", *keys])
    found = [launch.rollout_environment(config, i)["CUDA_VISIBLE_DEVICES"] for i in range(2)]
    assert found == expected


def test_more_engines_than_gpus_are_refused_before_the_start(monkeypatch):
    monkeypatch.setattr(launch, "gpu_count", lambda: 3)
    config = config_file.load(
        starter.FOLDER / "demo.yaml", ["rollout.engine=vllm", "rollout.engines=4"]
    )
    with pytest.raises(UserInputError, match="needs 4 GPUs, and there are 3"):
        launch.check_rollout_engine(config)


def test_a_python_without_vllm_is_named_with_the_remedy(tmp_path, monkeypatch):
    config = config_file.load(starter.FOLDER / "demo.yaml", ["rollout.engine=vllm"])
    monkeypatch.setattr(launch, "OWN_ENVIRONMENT", tmp_path / "nowhere")
    with pytest.raises(UserInputError, match="has no vLLM: run `make vllm`"):
        launch.check_rollout_engine(config)
    missing = config_file.load(
        starter.FOLDER / "demo.yaml", ["rollout.engine=vllm", f"rollout.python={tmp_path}/none"]
    )
    with pytest.raises(UserInputError, match=r"rollout\.python: .*/none cannot be run"):
        launch.check_rollout_engine(missing)
