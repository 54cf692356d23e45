"""How torchrun's agent ends the ranks of a machine, whatever they do."""

import signal
import sys

import pytest

from engine.train.torchrun import agent as agents
from engine.train.torchrun.rendezvous import StoreRendezvous

RANKS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ranks do
if os.environ["RANK"] == "1":
    open(sys.argv[1], "w").close()
    {second}
    sys.exit()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
{first}
"""
LONG = "time.sleep(20); os._exit(7)"
"""Shorter than the 30 seconds that torch gives a rank."""


@pytest.fixture
def run_agent(tmp_path, monkeypatch):
    """Runs an agent with two ranks; `first` and `second` are what they do. Returns both results."""
    monkeypatch.setattr(agents, "SHUTDOWN_TIMEOUT", 0.1)
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")  # to be restored
    before = signal.getsignal(signal.SIGQUIT)

    def run(first, second):
        spec = agents.WorkerSpec(
            role="rank", local_world_size=2, entrypoint=sys.executable, max_restarts=0,
            args=("-c", RANKS.format(first=first, second=second), str(tmp_path / "ready")),
            rdzv_handler=StoreRendezvous("", 1, 60.0, first=True, secret=""),
            local_addr="127.0.0.1",
        )  # fmt: skip
        agent = agents.Agent(spec, tmp_path / "torch")
        return agent, agent.run()

    yield run
    signal.signal(signal.SIGQUIT, before)


@pytest.mark.parametrize(
    ("end", "code"),
    [("os._exit(3)", 3), ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV)],
)
def test_the_other_ranks_are_ended_and_the_first_failure_is_known(run_agent, end, code):
    agent, result = run_agent(end, LONG)
    assert result.is_failed()
    assert result.failures[1].exitcode == -signal.SIGKILL
    assert agent.failed == [code]


def test_a_rank_that_has_ended_well_waits_for_the_others(run_agent):
    agent, result = run_agent("os._exit(0)", "time.sleep(0.3)")
    assert not result.is_failed()
    assert agent.failed == []
