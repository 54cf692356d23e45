"""A folder of sessions, and a session in it, as the command line and the files show them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from engine.journal.reader import JournalReader
from engine.protocol.client import Client
from engine.session.folder import Session

PROGRAM = Path(sys.executable).with_name("rlhf-tui")
LONG = 240.0
"""Seconds after which something that should have happened will not: for a busy machine."""
STEPS = 8
TINY = (
    "rollout.batch_size=4", "rollout.max_new_tokens=6", "ppo.epochs=1", "ppo.minibatches=1",
    "ppo.micro_batch_size=4", "kl.controller=adaptive", "kl.beta=0.05", "kl.target=6",
    "kl.horizon=500", "train.learning_rate=3e-4", "train.save_every=4", "log.tensorboard=false",
    "launch.device=cpu", "launch.threads=1", "launch.nice=0",
)  # fmt: skip
"""A step of a tenth of a second on an idle core."""
GATE = Path(__file__).with_name("gate.py")


def until(condition: Callable[[], Any], what: str, seconds: float = LONG) -> Any:
    """Waits for a condition and returns its value; a failure says what never came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"within {seconds:g} s: no {what}")


def processes(folder: Path) -> list[psutil.Process]:
    """Every process that shows a folder in its command line."""
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
    """What must be the same bit for bit: all metrics but times and speeds."""
    skip = ("time", "perf/", "attempt")
    return [{k: v for k, v in row.items() if not k.startswith(skip)} for row in rows]


class Lab:
    """A folder of sessions and the command line on it."""

    program = PROGRAM

    def __init__(self, root: Path, gates: Path) -> None:
        self.root = root
        self._gates = gates
        self.environment = os.environ | {
            "RLHF_TUI_SESSIONS": str(root),
            "XDG_STATE_HOME": str(gates / "state"),
            "HF_HUB_OFFLINE": "1",
            "TERM": "dumb",
            "COLUMNS": "200",
        }

    def cli(self, *args: object, timeout: float = LONG) -> subprocess.CompletedProcess[str]:
        """Runs `rlhf-tui` to its end."""
        return subprocess.run(
            [PROGRAM, *map(str, args)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def json(self, *args: object) -> Any:
        """What a command prints with --json."""
        done = self.cli(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def popen(self, *args: object, **options: Any) -> subprocess.Popen[str]:
        """Starts `rlhf-tui` and goes on."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        options = {"env": self.environment} | options
        return subprocess.Popen(
            [PROGRAM, *map(str, args)],
            text=True,
            stdin=subprocess.DEVNULL,
            **options,
        )

    def run(self, name: str, *overrides: str, steps: int = STEPS) -> "Run":
        """A run that is to be, with a gate of its own."""
        gate = self._gates / name
        gate.mkdir(parents=True)
        shutil.copy(GATE, gate)
        return Run(self, name, gate, overrides, steps)


class Run:
    """One session, from the outside."""

    def __init__(
        self, lab: Lab, name: str, gate: Path, overrides: tuple[str, ...], steps: int
    ) -> None:
        self.lab = lab
        self.name = name
        self.gate = gate
        self.session = Session(lab.root / name)
        mix = "reward.mix=[{model: 'starter:reward'}, {function: 'gate:score', weight: 0.5}]"
        given = (*TINY, "reward.model=null", mix, f"reward.path={gate}", *overrides)
        options = [word for override in given for word in ("-o", override)]
        self.arguments = ["demo", "--name", name, "--steps", str(steps), *options]

    # -- its life --------------------------------------------------------------------------------

    def start(self, mode: str = "--detach") -> subprocess.CompletedProcess[str]:
        """Starts it and expects that to work."""
        done = self.lab.cli(*self.arguments, mode)
        assert done.returncode == 0, done.stderr + done.stdout
        return done

    def resume(self, *options: str, mode: str = "--detach") -> subprocess.CompletedProcess[str]:
        """Goes on with it and expects that to work."""
        done = self.lab.cli("resume", self.name, *options, mode)
        assert done.returncode == 0, done.stderr + done.stdout
        return done

    def ctl(self, *args: object) -> subprocess.CompletedProcess[str]:
        """Steers it."""
        return self.lab.cli("ctl", self.name, *args)

    def order(self, *args: object) -> dict[str, Any]:
        """Steers it and waits: the final answer."""
        done = self.ctl(*args, "--wait", "--json")
        assert done.returncode in (0, 1), done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def end(self) -> None:
        """Ends whatever lives of it."""
        for process in processes(self.session.folder):
            process.kill()
        until(lambda: not processes(self.session.folder), f"end of {self.name}")

    # -- its gate --------------------------------------------------------------------------------

    def hold(self, *steps: int) -> None:
        """From now on, these steps wait for :meth:`release`."""
        for step in steps:
            (self.gate / f"at-{step}").unlink(missing_ok=True)
            (self.gate / f"hold-{step}").touch()

    def wait_at(self, step: int) -> None:
        """Until a held step has begun."""
        until((self.gate / f"at-{step}").exists, f"step {step} of {self.name}")

    def release(self, *steps: int) -> None:
        """Lets steps go on."""
        for step in steps:
            (self.gate / f"hold-{step}").unlink(missing_ok=True)

    def answer_at(self, step: int, score: str) -> None:
        """What the gate returns at a step instead: a number for each response, or `short`.

        `raise TEXT` has it raise an error of that text.
        """
        (self.gate / f"score-{step}").write_text(score)

    # -- what it says ----------------------------------------------------------------------------

    def record(self) -> JournalReader:
        """Its journal, to read."""
        return JournalReader(self.session)

    def client(self) -> Client:
        """A connection to its engine."""
        return Client(self.session, "a test")

    @property
    def state(self) -> str:
        """As the journal has it."""
        with self.record() as record:
            return record.state()

    @property
    def step(self) -> int:
        """The last completed one."""
        with self.record() as record:
            return record.last_step()

    def wait_for(self, *states: str) -> str:
        """Until it is in one of these states."""
        until(lambda: self.state in states, f"state {' or '.join(states)} of {self.name}")
        return self.state

    def wait_gone(self) -> None:
        """Until no process of it is left."""
        until(lambda: not processes(self.session.folder), f"end of every process of {self.name}")

    def wait_saved(self, step: int) -> None:
        """Until the checkpoint of a step, which is written beside the next ones, is whole."""
        marker = self.session.checkpoints / f"step-{step:06d}" / "COMPLETE"
        until(marker.exists, f"checkpoint of step {step} of {self.name}")

    def finish(self) -> None:
        """Until it has ended as it should, and every process with it."""
        state = self.wait_for("finished", "failed", "stopped", "crashed")
        assert state == "finished", self.session.log_file.read_text()[-3000:]
        self.wait_gone()

    def numbers(self) -> list[dict[str, Any]]:
        """Its metrics, as far as they must be the same bit for bit."""
        with self.record() as record:
            return numbers([row.as_json() for row in record.metrics()])

    def betas(self) -> dict[int, float]:
        """The KL coefficient of each step."""
        with self.record() as record:
            return dict(record.series("objective/kl_coef"))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Its events of a kind, as `events --json` prints them."""
        with self.record() as record:
            return [e.as_json() for e in record.events() if e.kind == kind]

    def commands(self) -> dict[str, dict[str, Any]]:
        """Its commands by id, as their events are printed."""
        with self.record() as record:
            return {c.id: c.as_json() for c in record.commands()}

    def checkpoint(self, step: int) -> dict[str, Any]:
        """A checkpoint's state.json: settings, and the hash of every file of weights."""
        path = self.session.checkpoints / f"step-{step:06d}" / "state.json"
        content: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        return content

    def engine(self) -> psutil.Process:
        """Its supervisor."""
        found = self.session.engine()
        assert found is not None
        return psutil.Process(found.pid)

    def ranks(self) -> dict[int, psutil.Process]:
        """Its ranks on this machine, by torchrun's number."""
        return {
            int(p.environ().get("RANK", "0")): p
            for p in processes(self.session.folder)
            if "engine.train.worker" in " ".join(p.cmdline())
        }

    def rank(self) -> psutil.Process:
        """Its one rank."""
        (worker,) = self.ranks().values()
        return worker
