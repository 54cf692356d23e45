"""Helpers to run `rlhf-tui` in a sessions folder and to inspect its sessions."""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import psutil

from engine.journal.reader import JournalReader
from engine.protocol.client import Client
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Command
from engine.session.folder import SessionFolder
from tests.e2e.command_server import CommandServer
from tests.waiting import LONG, until

PROGRAM = Path(sys.executable).with_name("rlhf-tui")
STEPS = 8
TINY = (
    "rollout.batch_size=4", "rollout.max_new_tokens=6", "ppo.epochs=1", "ppo.minibatches=1",
    "ppo.micro_batch_size=4", "kl.controller=adaptive", "kl.beta=0.05", "kl.target=6",
    "kl.horizon=500", "train.learning_rate=3e-4", "train.save_every=4", "log.tensorboard=false",
    "launch.device=cpu", "launch.threads=1", "launch.nice=0",
)  # fmt: skip
"""Overrides for steps of a tenth of a second on an idle core."""
GATE = Path(__file__).with_name("gate.py")
ROOT = Path(__file__).parents[2]
OLD_SESSIONS = ROOT / "tests" / "data" / "sessions-0.1.0"
"""See tests/e2e/test_compatibility.py."""
LIGHT = {
    "RLHF_TUI_TEST_LIGHT": "0.02",
    "PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'hooks'}:{ROOT}",
}
"""The environment in which ranks have no model (tests/faults/light_rank.py): a start takes half a
second of processor time instead of six."""


@cache
def commands() -> CommandServer:
    """The server of this process of pytest, started for the first command."""
    server = CommandServer()
    atexit.register(server.close)
    return server


def processes(folder: Path) -> list[psutil.Process]:
    """All processes whose command line contains a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and any(
                str(folder) in part for part in process.cmdline()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that must be equal bit for bit: all except times and speeds."""
    skip = ("time", "perf/", "attempt")
    return [{k: v for k, v in row.items() if not k.startswith(skip)} for row in rows]


class Lab:
    """A sessions folder, and the command line with it."""

    program = PROGRAM

    def __init__(self, root: Path, gates: Path) -> None:
        self.root = root
        self._gates = gates
        self.environment = os.environ | {
            "PATH": f"{Path(PROGRAM).parent}{os.pathsep}{os.environ['PATH']}",
            "RLHF_TUI_SESSIONS": str(root),
            # Not those of whoever runs the tests, whose preferences change the screens.
            "XDG_CONFIG_HOME": str(gates / "config"),
            "XDG_STATE_HOME": str(gates / "state"),
            "XDG_CACHE_HOME": str(gates / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TERM": "dumb",
            "COLUMNS": "200",
        }

    def with_light_ranks(self) -> "Lab":
        """The same folder, for runs whose ranks have no model."""
        other = Lab(self.root, self._gates)
        other.environment |= LIGHT
        return other

    @property
    def is_light(self) -> bool:
        """Whether the ranks have no model."""
        return LIGHT.items() <= self.environment.items()

    def cli(self, *args: object, timeout: float = LONG) -> subprocess.CompletedProcess[str]:
        """Runs `rlhf-tui` and waits for it."""
        return commands().run([*map(str, args)], self.environment, timeout)

    def json(self, *args: object) -> Any:
        """Runs a command with --json and returns the decoded output."""
        done = self.cli(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def popen(self, *args: object, **options: Any) -> subprocess.Popen[str]:
        """Starts `rlhf-tui` without waiting for it."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        options = {"env": self.environment} | options
        return subprocess.Popen(
            [PROGRAM, *map(str, args)],
            text=True,
            stdin=subprocess.DEVNULL,
            **options,
        )

    def run(self, name: str, *overrides: str, steps: int = STEPS) -> "Run":
        """Prepares a run with its own gate; does not start it."""
        gate = self._gates / name
        gate.mkdir(parents=True)
        shutil.copy(GATE, gate)
        return Run(self, name, gate, overrides, steps)


class Run:
    """One session, accessed through the command line, its files and its socket."""

    def __init__(
        self, lab: Lab, name: str, gate: Path, overrides: tuple[str, ...], steps: int
    ) -> None:
        self.lab = lab
        self.name = name
        self.gate = gate
        self.session = SessionFolder(lab.root / name)
        mix = "reward.mix=[{model: 'starter:reward'}, {function: 'gate:score', weight: 0.5}]"
        combined = (*TINY, "reward.model=null", mix, f"reward.path={gate}", *overrides)
        options = [word for override in combined for word in ("-o", override)]
        self.arguments = ["demo", "--name", name, "--steps", str(steps), *options]

    # -- start, commands, end --------------------------------------------------------------------

    def start(self, mode: str = "--detach") -> subprocess.CompletedProcess[str]:
        """Starts the run; fails if that does not succeed."""
        done = self.lab.cli(*self.arguments, mode)
        assert done.returncode == 0, done.stderr + done.stdout
        return done

    def resume(self, *options: str, mode: str = "--detach") -> subprocess.CompletedProcess[str]:
        """Resumes the run; fails if that does not succeed."""
        done = self.lab.cli("resume", self.name, *options, mode)
        assert done.returncode == 0, done.stderr + done.stdout
        return done

    def ctl(self, *args: object) -> subprocess.CompletedProcess[str]:
        """Runs `rlhf-tui ctl` on the session."""
        return self.lab.cli("ctl", self.name, *args)

    def command(self, *args: object) -> dict[str, Any]:
        """Sends a command and waits for its result, applied or rejected."""
        done = self.ctl(*args, "--wait", "--json")
        assert done.returncode in (0, 1), done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def send(self, command: Command) -> CommandReply:
        """Sends a command from this process and waits for its result; no Python is started."""
        with self.client() as client:
            reply = client.send(command)
            return reply if reply.final else client.wait(reply.id, LONG)

    def end(self) -> None:
        """Kills all processes of the session."""
        for process in processes(self.session.folder):
            with contextlib.suppress(psutil.NoSuchProcess):  # a rank ends with its engine
                process.kill()
        until(lambda: not processes(self.session.folder), f"end of {self.name}")

    # -- the gate --------------------------------------------------------------------------------

    def hold(self, *steps: int) -> None:
        """Makes these steps block until :meth:`release`."""
        for step in steps:
            (self.gate / f"at-{step}").unlink(missing_ok=True)
            (self.gate / f"hold-{step}").touch()

    def wait_at(self, step: int) -> None:
        """Waits until a held step has reached the gate."""
        until((self.gate / f"at-{step}").exists, f"step {step} of {self.name}")

    def release(self, *steps: int) -> None:
        """Unblocks steps."""
        for step in steps:
            (self.gate / f"hold-{step}").unlink(missing_ok=True)

    def slow_down(self) -> None:
        """Makes every step take a quarter of a second longer, without computing anything."""
        (self.gate / "slow").touch()

    def score_at(self, step: int, score: str) -> None:
        """Replaces the scores of a step by a number.

        `raise TEXT` raises an error with that text instead, `fail TEXT` one in the update; an
        empty string ends the replacement.
        """
        (self.gate / f"score-{step}").write_text(score)

    # -- inspection ------------------------------------------------------------------------------

    def reader(self) -> JournalReader:
        """Opens the journal for reading."""
        return JournalReader(self.session)

    def client(self) -> Client:
        """Opens a connection to the engine."""
        return Client(self.session, "a test")

    @property
    def state(self) -> str:
        """The state in the journal."""
        with self.reader() as reader:
            return reader.state()

    @property
    def step(self) -> int:
        """The last completed step in the journal."""
        with self.reader() as reader:
            return reader.last_step()

    def wait_for(self, *states: str) -> str:
        """Waits until the session is in one of these states; returns the state."""
        until(lambda: self.state in states, f"state {' or '.join(states)} of {self.name}")
        return self.state

    def wait_sent(self) -> None:
        """Waits until rank 0 has been sent the commands that the journal has as accepted.

        The engine answers a client after it has carried out what it recorded before.
        """
        with self.client() as client:
            client.status()

    def wait_gone(self) -> None:
        """Waits until all processes of the session have ended."""
        until(lambda: not processes(self.session.folder), f"end of every process of {self.name}")

    def wait_saved(self, step: int) -> None:
        """Waits until the checkpoint of a step, written in the background, is complete."""
        marker = self.session.checkpoints / f"step-{step:06d}" / "COMPLETE"
        until(marker.exists, f"checkpoint of step {step} of {self.name}")

    def finish(self) -> None:
        """Waits until the run has finished and all its processes have ended."""
        state = self.wait_for("finished", "failed", "stopped", "crashed")
        assert state == "finished", self.session.log_file.read_text()[-3000:]
        self.wait_gone()

    def numbers(self) -> list[dict[str, Any]]:
        """The metrics that must be equal bit for bit, by step."""
        with self.reader() as reader:
            return numbers([row.as_json() for row in reader.metrics.rows()])

    def betas(self) -> dict[int, float]:
        """The KL coefficient of each step."""
        with self.reader() as reader:
            return dict(reader.metrics.series("objective/kl_coef"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, as `events --json` prints them."""
        with self.reader() as reader:
            return [e.as_json() for e in reader.events() if e.kind == kind]

    def commands(self) -> dict[str, dict[str, Any]]:
        """The commands by id, as `events --json` prints them."""
        with self.reader() as reader:
            return {c.id: c.as_json() for c in reader.commands()}

    def checkpoint(self, step: int) -> dict[str, Any]:
        """The state.json of a checkpoint, which holds the settings and a hash of every file."""
        path = self.session.checkpoints / f"step-{step:06d}" / "state.json"
        content: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        return content

    def engine(self) -> psutil.Process:
        """The process of the supervisor."""
        info = self.session.engine()
        assert info is not None
        return psutil.Process(info.pid)

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks on this machine, by rank."""
        return {
            int(p.environ().get("RANK", "0")): p
            for p in processes(self.session.folder)
            if "engine.train.worker" in " ".join(p.cmdline())
        }

    def rank(self) -> psutil.Process:
        """The process of the only rank."""
        (worker,) = self.ranks().values()
        return worker


class Once:
    """Finished runs that one test process makes and the others copy, since a start is expensive."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder

    def made(self, run: Run, make: Callable[[Run], None]) -> Run:
        """Makes a run, or copies the session of another process that has made it.

        Args:
            run: prepared, not started.
            make: trains it to its end. No process of the session may be left then.
        """
        shared = self._folder / run.name
        with (self._folder / f"{run.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not shared.exists():
                try:
                    make(run)
                    run.wait_gone()
                finally:
                    run.end()
                shutil.copytree(run.session.folder, self._folder / "part")
                (self._folder / "part").rename(shared)
            else:
                shutil.copytree(shared, run.session.folder)
        return run
