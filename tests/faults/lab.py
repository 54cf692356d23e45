"""Runs of a tiny model to which faults are done, and what must hold after each of them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from engine.config import file as config_file
from engine.errors import JournalError, RlhfError, SessionError
from engine.journal.judgements.labels import LabelReader, Response, set_label
from engine.journal.reader import JournalReader
from engine.launch import start as launch
from engine.launch.background import start_engine
from engine.launch.start_checkpoints import has_history
from engine.launch.start_options import StartOptions
from engine.protocol.client import Client, new_id
from engine.protocol.commands import AnyCommand, Note, Pause, SetSetting, Unpause
from engine.protocol.rank_messages import ROOM
from engine.session.checkpoints import complete_checkpoints
from engine.session.folder import create
from engine.session.states import LIVE_STATES
from engine.verification.verify import verify
from tests.e2e.lab import PROGRAM, numbers, processes
from tests.waiting import is_running, until

HERE = Path(__file__).parent
DATA = HERE.parent / "data" / "sessions-0.1.0"
HOOKS = HERE / "hooks"
WAIT = 300.0
"""Seconds for anything on a busy machine."""
OVERRIDES = (
    "rollout.batch_size=4", "rollout.max_new_tokens=6", "ppo.epochs=1", "ppo.minibatches=1",
    "ppo.micro_batch_size=4", "kl.controller=fixed", "kl.beta=0.05", "train.learning_rate=3e-4",
    "train.save_every=3", "log.tensorboard=false", "launch.device=cpu", "launch.threads=1",
    "launch.nice=0", "launch.max_restarts=1000", "guardrails.rules=[]",
)  # fmt: skip


class LostError(AssertionError):
    """Something that was acknowledged is gone, or the run is not what it was."""


def tree(folder: Path) -> list[str]:
    """The overrides that name the tiny model, its prompts and its reward."""
    return [
        f"model.policy={DATA}/policy",
        f"data.prompts={DATA}/prompts.jsonl",
        "reward={function: 'reward:score'}",
        f"reward.path={folder}",
    ]


class Acknowledged:
    """What the engine and the labels have acknowledged to clients."""

    def __init__(self) -> None:
        self.commands: dict[str, str] = {}
        """Id → the last status that a reply had."""
        self.labels: dict[tuple[int, int, int], str] = {}
        """Attempt, step and index → label."""
        self.checkpoints: set[int] = set()
        """Steps reported complete."""


class FaultRun:
    """One session with a reward of its own."""

    def __init__(self, root: Path, name: str, *overrides: str, steps: int = 400) -> None:
        self.place = root / f"reward-{name}"
        self.place.mkdir(parents=True)
        shutil.copy(HERE / "reward.py", self.place)
        base = config_file.load(
            _config(root), [*OVERRIDES, *tree(self.place), f"train.steps={steps}", *overrides]
        )
        self.session = create(root / "sessions", name, base)
        self.acknowledged = Acknowledged()
        self._steering: threading.Thread | None = None
        self._steer = threading.Event()
        self._sent = 0

    # -- life -------------------------------------------------------------------------------------

    def start(self, environment: dict[str, str] | None = None, **options: Any) -> int:
        """Starts or resumes the engine; returns its process id. Does not wait for it to train."""
        if has_history(self.session):
            start = launch.resume(
                self.session, from_step=options.get("from_step"), reseed=False, overrides=[],
                who="faults",
            )  # fmt: skip
        else:
            start = StartOptions(who="faults")
        added = {"PYTHONPATH": f"{HOOKS}:{HOOKS.parents[2]}"} | (environment or {})
        with _environment(added):
            pid = start_engine(self.session, start, timeout=0.0)
        # One that was killed at a point may have ended before it is looked at.
        until(lambda: self.session.is_live() or not is_running(pid), "an engine", WAIT)
        return pid

    def state(self) -> str:
        """The session's state, `crashed` included."""
        with JournalReader(self.session) as reader:
            return reader.state()

    def step(self) -> int:
        """The last step in the journal."""
        with JournalReader(self.session) as reader:
            return reader.last_step()

    def wait_for_step(self, step: int) -> None:
        """Waits until a step is recorded, or the engine has ended."""
        until(lambda: self.step() >= step or self.is_over(), f"step {step}", WAIT)

    def wait_for(self, *states: str) -> str:
        """Waits for one of the states; returns it."""
        return str(until(lambda: (s := self.state()) in states and s, f"one of {states}", WAIT))

    def is_over(self) -> bool:
        """Whether no engine has the session and its processes have ended."""
        return not self.session.is_live() and not processes(self.session.folder)

    def engine(self) -> psutil.Process | None:
        """The process of the supervisor."""
        info = self.session.engine()
        with contextlib.suppress(psutil.Error):
            return psutil.Process(info.pid) if info is not None else None
        return None

    def ranks(self) -> list[psutil.Process]:
        """The processes of ranks."""
        return self._with("engine.train.worker")

    def agents(self) -> list[psutil.Process]:
        """torchrun's agent, which starts several ranks."""
        return self._with("torchrun.agent")

    def _with(self, module: str) -> list[psutil.Process]:
        found = []
        for process in processes(self.session.folder):
            with contextlib.suppress(psutil.Error):
                if module in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def kill_engine(self) -> bool:
        """Kills the supervisor; the ranks must end with it. Returns whether there was one."""
        killed = False
        if (engine := self.engine()) is not None:
            with contextlib.suppress(psutil.Error):
                engine.kill()
                killed = True
        until(self.is_over, "the end of every process", WAIT)
        return killed

    def end(self) -> None:
        """Ends everything that may be left."""
        self.stop_steering()
        for process in processes(self.session.folder):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
                process.kill()

    def finish(self) -> None:
        """Waits for the regular end."""
        if (state := self.wait_for("finished", "failed", "stopped", "crashed")) != "finished":
            raise LostError(f"{state}: {self.log()[-600:]}")
        until(self.is_over, "the end of every process", WAIT)

    def log(self) -> str:
        """engine.log."""
        return self.session.log_file.read_text("utf-8", "replace")

    def fault(self, text: str) -> None:
        """Makes the reward misbehave; an empty text ends that."""
        path = self.place / "fault"
        if text:
            path.write_text(text)
        else:
            path.unlink(missing_ok=True)

    # -- steering ---------------------------------------------------------------------------------

    def send(self, command: AnyCommand, timeout: float = 20.0) -> str:
        """Sends a command and keeps what was acknowledged; returns its status, or empty."""
        command_id = new_id()
        try:
            with Client(self.session, "faults") as client:
                reply = client.send(command, command_id=command_id)
                if reply.status == "rejected" and reply.reason.startswith("cannot write"):
                    return reply.status  # there is no room to record that
                self.acknowledged.commands[command_id] = reply.status
                if not reply.final:
                    reply = client.wait(command_id, timeout)
                    self.acknowledged.commands[command_id] = reply.status
        except (RlhfError, OSError, TimeoutError):
            return self.acknowledged.commands.get(command_id, "")
        return str(reply.status)

    def send_note(self) -> str:
        """Sends a note; returns its status, or empty."""
        return self.send(Note(text="a note"), 2.0)

    def send_pause(self) -> str:
        """Sends a pause; returns its status, or empty."""
        return self.send(Pause())

    def send_unpause(self) -> str:
        """Sends the end of a pause; returns its status, or empty."""
        return self.send(Unpause())

    def send_target(self, value: float) -> str:
        """Sets a target, which the fixed controller does not use."""
        return self.send(SetSetting(key="target", value=value))

    def setting(self, name: str) -> object:
        """A setting in force."""
        with JournalReader(self.session) as reader:
            return (reader.meta().settings or {}).get(name)

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs `rlhf-tui`."""
        return subprocess.run(
            [PROGRAM, *words, "--sessions", str(self.session.folder.parent)],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=WAIT,
        )  # fmt: skip

    def waits_for_room(self) -> bool:
        """Whether the supervisor says that the journal's disk is full."""
        with contextlib.suppress(RlhfError, OSError), Client(self.session, "faults") as client:
            return any(phase.waits_for == ROOM for phase in client.status().phases)
        return False

    def watchers(self) -> int:
        """The number of clients that watch; 0 without an engine."""
        with contextlib.suppress(RlhfError, OSError), Client(self.session, "faults") as client:
            return client.status().watchers
        return 0

    def start_steering(self) -> None:
        """Sends commands that change no number of the run, and labels, until stopped."""
        self._steer.set()
        self._steering = threading.Thread(target=self._steer_on, daemon=True)
        self._steering.start()

    def stop_steering(self) -> None:
        """Ends the thread that sends."""
        self._steer.clear()
        if self._steering is not None:
            self._steering.join(60)
            self._steering = None

    def _steer_on(self) -> None:
        while self._steer.is_set():
            self._sent += 1
            # The fixed controller has no use for a target.
            change = SetSetting(key="target", value=1.0 + self._sent % 50)
            command = Note(text=f"note {self._sent}") if self._sent % 3 == 0 else change
            status = self.send(command, 2.0)
            with contextlib.suppress(JournalError, SessionError):
                self.label_one()
            time.sleep(0.1 if status else 0.3)

    def label_one(self) -> None:
        """Labels the newest sample."""
        with JournalReader(self.session) as reader:
            found = reader.samples.newest(1)
        if found:
            sample = found[0]
            label = ("good", "bad", "hack")[self._sent % 3]
            set_label(self.session, sample.prompt, Response.of(sample), label, "faults")
            self.acknowledged.labels[sample.attempt, sample.step, sample.index] = label

    # -- what must hold ---------------------------------------------------------------------------

    def check(self, undisturbed: "FaultRun | None" = None) -> None:
        """Raises LostError if anything acknowledged is lost or a number is not as undisturbed."""
        problems = [f.text for f in verify(self.session).findings if f.level == "problem"]
        if problems:
            raise LostError(f"verify: {problems}")
        with JournalReader(self.session) as reader:
            commands = {c.id: c for c in reader.commands()}
            # A roll back leaves a checkpoint on another branch; one of the same step replaces it.
            kinds = ("complete", "removed", "superseded", "replaced")
            rows = {c.step: c.status for c in reader.checkpoints(kinds)}
            metrics = [row.as_json() for row in reader.metrics.rows()]
            state = reader.state()
        for command_id, status in self.acknowledged.commands.items():
            if command_id not in commands:
                raise LostError(f"command {command_id}, {status}, is gone")
            now = commands[command_id].status
            if status in ("applied", "rejected") and now != status:
                raise LostError(f"command {command_id} was {status} and is {now}")
            if now in ("queued", "accepted") and state not in (*LIVE_STATES, "crashed"):
                raise LostError(f"command {command_id} is {now} after the end")
        with LabelReader(self.session) as labels:
            kept = {key: found.judgement.label for key, found in labels.judgements().items()}
        for key, label in self.acknowledged.labels.items():
            if kept.get(key) != label:
                raise LostError(f"label {label} of {key} is {kept.get(key)}")
        lost = [s for s in self.acknowledged.checkpoints if s not in rows]
        if lost:
            raise LostError(f"checkpoints {lost} were reported and are gone")
        self.acknowledged.checkpoints |= {s for s, status in rows.items() if status == "complete"}
        if undisturbed is not None:
            self._compare(undisturbed, metrics)

    def check_end(self, undisturbed: "FaultRun") -> None:
        """Like :meth:`check`, and all steps and the last weights must be there to compare."""
        self.check(undisturbed)
        last = undisturbed.step()
        if self.step() != last:
            raise LostError(f"the run ended at step {self.step()}, the undisturbed one at {last}")
        ours, theirs = (
            complete_checkpoints(run.session.checkpoints).get(last) for run in (self, undisturbed)
        )
        if ours is None or theirs is None or not hashes(ours) or hashes(ours) != hashes(theirs):
            raise LostError(f"the weights of step {last}, the last one, are missing or differ")

    def _compare(self, undisturbed: "FaultRun", metrics: list[dict[str, Any]]) -> None:
        """Every step's numbers and every checkpoint's weights, bit for bit."""
        expected = undisturbed.numbers()
        for row, other in zip(numbers(metrics), expected, strict=False):
            if row != other:
                different = {k: (row[k], other.get(k)) for k in row if row[k] != other.get(k)}
                raise LostError(f"step {row['step']} differs: {different}")
        theirs = complete_checkpoints(undisturbed.session.checkpoints)
        for step, folder in complete_checkpoints(self.session.checkpoints).items():
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                if step in theirs and hashes(folder) != hashes(theirs[step]):
                    raise LostError(f"the weights of step {step} differ")

    def numbers(self) -> list[dict[str, Any]]:
        """The metrics that must be equal bit for bit."""
        with JournalReader(self.session) as reader:
            return numbers([row.as_json() for row in reader.metrics.rows()])


def hashes(folder: Path) -> dict[str, str]:
    """The sums of a checkpoint's files, without those of the tokenizer's."""
    content = json.loads((folder / "state.json").read_text())
    return {k: v for k, v in content["hashes"].items() if k.endswith(".safetensors")}


def _config(root: Path) -> Path:
    path = root / "empty.yaml"
    if not path.exists():
        path.write_text(f"data: {{prompts: {DATA}/prompts.jsonl}}\n")
    return path


@contextlib.contextmanager
def _environment(added: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
