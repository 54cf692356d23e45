"""The supervisor keeps a rollout engine alive, and says when it cannot."""

import asyncio
import os
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest

from engine import starter
from engine.config import file as config_file
from engine.errors import UserInputError
from engine.launch import rollout_engine as launch
from engine.launch.environment import (
    ROLLOUT_DISK_VARIABLE,
    ROLLOUT_FOLDER_VARIABLE,
    ROLLOUT_SOCKET_VARIABLE,
    TF32_OVERRIDE,
)
from engine.launch.start import StartOptions
from engine.protocol import sockets
from engine.session.folder import create
from engine.supervisor.attempt import Attempt
from engine.supervisor.rollout_process import RolloutProcess
from engine.supervisor.state import SupervisorState

DEADLINE = 30.0


async def until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture
def make(tmp_path):
    """Returns a function that makes the process of a session; its "Python" is a shell script."""

    def made(script="exec sleep 1000", engine="vllm", restarts=2, error=None):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        keys = [f"rollout.engine={engine}", f"rollout.python={python}",
                f"launch.max_restarts={restarts}", "launch.device=cpu"]  # fmt: skip
        config = config_file.load(starter.FOLDER / "demo.yaml", keys)
        state = SupervisorState(settings={}, attempt=Attempt(StartOptions()), next=None)
        said = []

        def restarted(text):
            if error is not None:
                raise error
            said.append(("restart", text))

        process = RolloutProcess(
            create(tmp_path, "s", config), config, state,
            on_restart=restarted,
            on_failure=lambda text: said.append(("failure", text)),
        )  # fmt: skip
        return process, state, said

    return made


async def test_native_rollouts_start_nothing(make):
    process, _, _ = make(engine="native")
    assert await process.start() == {}
    assert process.pid is None


async def test_an_engine_that_is_killed_is_started_again_and_ends_with_the_attempt(make):
    process, _, said = make()
    variables = await process.start()
    socket, folder, disk = (
        Path(variables[name])
        for name in (ROLLOUT_SOCKET_VARIABLE, ROLLOUT_FOLDER_VARIABLE, ROLLOUT_DISK_VARIABLE)
    )
    sockets.connect(socket).close()  # before any engine answers
    assert folder.stat().st_mode & 0o777 == disk.stat().st_mode & 0o777 == 0o700
    assert socket.with_name("rollout.log").stat().st_mode & 0o777 == 0o600
    first = process.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: process.pid not in (None, first))
    assert [kind for kind, _ in said] == ["restart"]
    assert "SIGKILL" in said[0][1]
    second = process.pid
    await process.stop()
    assert not psutil.pid_exists(second)
    assert not socket.exists()
    assert not folder.exists()
    assert not disk.exists()


async def test_engines_that_end_again_and_again_within_a_step_fail_the_attempt(make):
    process, _, said = make(script="exit 3")
    await process.start()
    await until(lambda: said and said[-1][0] == "failure")
    assert [kind for kind, _ in said] == ["restart", "restart", "failure"]
    assert "ended with status 3, again; see" in said[-1][1]
    await process.stop()


async def test_an_engine_is_started_again_although_the_journal_cannot_be_written(make):
    process, _, said = make(script="exit 3", error=sqlite3.OperationalError("disk is full"))
    await process.start()
    await until(lambda: said)
    assert [kind for kind, _ in said] == ["failure"]
    assert "ended with status 3, again; see" in said[0][1]
    await process.stop()


async def test_an_engine_that_is_no_longer_watched_fails_the_attempt(make):
    process, _, said = make(script="exit 3", error=KeyError("rule"))
    await process.start()
    await until(lambda: said)
    assert said == [("failure", "the rollout engine is no longer watched: KeyError: 'rule'")]
    await process.stop()


def test_an_engine_does_not_inherit_what_rounds_its_products(monkeypatch):
    monkeypatch.setenv(TF32_OVERRIDE, "1")
    config = config_file.load(starter.FOLDER / "demo.yaml", ["rollout.engine=vllm"])
    assert TF32_OVERRIDE not in launch.rollout_environment(config)


def test_a_python_without_vllm_is_named_with_the_remedy(tmp_path, monkeypatch):
    config = config_file.load(starter.FOLDER / "demo.yaml", ["rollout.engine=vllm"]).rollout
    monkeypatch.setattr(launch, "OWN_ENVIRONMENT", tmp_path / "nowhere")
    with pytest.raises(UserInputError, match="has no vLLM: run `make vllm`"):
        launch.check_rollout_python(config)
    missing = config_file.load(
        starter.FOLDER / "demo.yaml", ["rollout.engine=vllm", f"rollout.python={tmp_path}/none"]
    )
    with pytest.raises(UserInputError, match=r"rollout\.python: .*/none cannot be run"):
        launch.check_rollout_python(missing.rollout)
