"""The end of a rank whose supervisor is gone."""

import logging
import socket
import sys
import threading

import msgspec
import pytest

from engine.config.sections.launch import LaunchConfig
from engine.launch import environment
from engine.protocol.rank_messages import RankHello
from engine.train import worker


def test_a_rank_whose_supervisor_was_killed_ends_with_one_line_of_the_log(
    supervisor, tmp_path, monkeypatch, caplog
):
    def kill():
        supervisor.wait_for(RankHello)
        supervisor.peer.shutdown(socket.SHUT_RDWR)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setenv(environment.SOCKET_VARIABLE, str(supervisor.path))
    monkeypatch.setenv(environment.TOKEN_VARIABLE, "token")
    launch = LaunchConfig(device="cpu", processes=1)
    monkeypatch.setenv(environment.LAUNCH_VARIABLE, msgspec.json.encode(launch).decode())
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    monkeypatch.setattr(worker, "exit_now", leave)  # it would end the tests
    killer = threading.Thread(target=kill)
    killer.start()
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as ended:
        worker.main()
    killer.join()
    assert ended.value.code == 1
    assert [r.getMessage() for r in caplog.records] == ["rank 0 ends: the supervisor has ended"]
    assert caplog.records[0].exc_info is None
