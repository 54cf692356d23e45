"""A rank without a model, which starts in a tenth of the time of one.

It is for hundreds of kills, and for tests of what the supervisor and its clients do. It speaks the
protocol of a rank, saves checkpoints in the order of a rank, and obeys commands at step boundaries.
Its "weights" are a chain of sums over the settings of each step, so they show whether a history was
repeated exactly. $RLHF_TUI_TEST_LIGHT, the seconds of a step, puts it in the place of
engine.train.worker (hooks/sitecustomize.py).
"""

import contextlib
import hashlib
import json
import os
import queue
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from engine.config.settings import (
    SettingChange,
    apply_settings,
    check_settings,
    have_effect,
    settings_of,
)
from engine.errors import CommandRejectedError
from engine.launch.environment import SOCKET_VARIABLE, STORE_VARIABLE, TOKEN_VARIABLE
from engine.launch.secret import SECRET_VARIABLE
from engine.protocol import frames, rank_messages, sockets
from engine.protocol.commands import (
    Checkpoint,
    Pause,
    Probe,
    SettingCommand,
    Stop,
    Undo,
    Unpause,
)
from engine.protocol.frames import Message
from engine.protocol.machines.store_client import StoreClient
from engine.protocol.machines.store_messages import SetKeys
from engine.protocol.rank_messages import (
    Applied,
    Begin,
    CheckpointComplete,
    CheckpointKept,
    CheckpointWritten,
    Confirm,
    Ended,
    Phase,
    RankCommand,
    RankHello,
    Ready,
    Rejected,
    RepeatedChange,
    StepReport,
)
from engine.session.checkpoints import (
    checkpoint_path,
    complete_checkpoints,
    mark_complete,
    sha256,
)
from engine.session.folder import SessionFolder
from tests.faults.light_step import LightStep

PACE = float(os.environ.get("RLHF_TUI_TEST_LIGHT", "0"))
"""Seconds of a step."""
REPORT_INTERVAL = 2.0
"""Seconds between `paused` messages, as in :mod:`engine.train.boundary`."""
ENDED = "light/ended"
"""A key of the store of several machines."""


class LightRank:
    """One rank, single-threaded but for the reader of its messages."""

    def __init__(self, session: SessionFolder) -> None:
        self._session = session
        self._config = session.config()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sock = sockets.connect(Path(os.environ[SOCKET_VARIABLE]))
        self._sock.settimeout(None)
        self.send(RankHello(token=os.environ[TOKEN_VARIABLE], rank=0))
        threading.Thread(target=self._read, daemon=True).start()
        begin = self._take()
        assert isinstance(begin, Begin)
        self._step, self._weights = begin.from_step, ""
        self._to_repeat, self._undoable = list(begin.repeat), list(begin.undoable)
        self._paused, self._stop = begin.paused, ""
        self._branch, self._kept = set(begin.checkpoints), set(begin.kept)
        self._results = LightStep(self._config)
        if begin.from_step:
            folder = checkpoint_path(session.checkpoints, begin.from_step)
            state = json.loads((folder / "state.json").read_text())["state"]
            self._set(state["settings"])
            self._weights = (folder / "weights").read_text()
        self._after_step = self._settings()
        """What a checkpoint holds, as in :meth:`engine.train.run.Run.saved_state`."""
        self.send(Ready(info={}, settings=self._settings()))

    def send(self, message: Message) -> None:
        """Sends a message."""
        self._sock.sendall(frames.encode(message))

    def _read(self) -> None:
        while True:
            try:
                self._inbox.put(rank_messages.decode_to_rank(frames.receive(self._sock)))
            except OSError:
                os._exit(1)

    def _take(self, confirm: int = 0) -> Any:
        """The next message; that confirms a step if one is given, and keeps the others."""
        kept = []
        while True:
            message = self._inbox.get()
            if not confirm or (isinstance(message, Confirm) and message.step == confirm):
                break
            kept.append(message)
        for other in kept:
            self._inbox.put(other)
        return message

    def _settings(self) -> dict[str, Any]:
        return msgspec.structs.asdict(settings_of(self._config))

    def _set(self, values: dict[str, Any]) -> list[SettingChange]:
        before = self._settings()
        merged = msgspec.convert(before | values, type(settings_of(self._config)), strict=False)
        self._config = apply_settings(self._config, merged)
        return [SettingChange(key=k, old=before[k], new=v) for k, v in values.items()]

    # -- life -------------------------------------------------------------------------------------

    def train(self) -> None:
        """Steps to the end."""
        while self._before_step():
            time.sleep(PACE)
            self._step += 1
            self._weights = next_weights(self._weights, self._step, self._settings())
            values = self._after_step = self._settings()
            metrics = {
                "objective/scores": score(self._weights), "objective/kl": 0.5, "time/step": PACE,
                "perf/tokens_per_second": 1.0,
                "episode": float(self._step * self._config.rollout.batch_size),
                "objective/entropy": score(self._weights),
                "objective/kl_coef": values["beta"], "lr": values["learning_rate"],
                "target": values["target"], "epochs": float(values["epochs"]),
            }  # fmt: skip
            samples = self._results.samples(self._step, self._weights)
            metrics |= self._results.metrics(samples)
            self.send(
                StepReport(step=self._step, metrics=metrics, samples=samples, settings=values)
            )
            if values["save_every"] and self._step % values["save_every"] == 0:
                with contextlib.suppress(OSError):  # a full disk: the next save tries again
                    self._save()
        self._save()
        if self._stop:
            self.send(Applied(id=self._stop, step=self._step + 1))
        self.send(Ended(step=self._step, reason="stopped" if self._stop else "finished"))

    def _before_step(self) -> bool:
        step = self._step + 1
        for repeated in [r for r in self._to_repeat if r.step == step]:
            self._repeat(repeated)
        self._to_repeat = [r for r in self._to_repeat if r.step != step]
        self._obey()
        reported = time.monotonic()
        while self._paused and not self._stop:
            if time.monotonic() - reported > REPORT_INTERVAL:
                reported = time.monotonic()
                self.send(Phase(rank=0, step=self._step, name="paused"))
            time.sleep(PACE)
            self._obey()
        return not self._stop and self._step < self._config.train.steps

    def _repeat(self, repeated: RepeatedChange) -> None:
        if not repeated.changes:
            return
        changes = self._set({c.key: c.new for c in repeated.changes})
        if repeated.command == Undo.name():
            del self._undoable[-1:]
        elif have_effect(repeated.changes):
            self._undoable.append(changes)

    def _obey(self) -> None:
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, RankCommand):
                try:
                    self._carry_out(message)
                except CommandRejectedError as error:
                    self.send(Rejected(id=message.id, reason=str(error)))

    def _carry_out(self, message: RankCommand) -> None:
        changes: list[SettingChange] = []
        match message.command:
            case Pause():
                self._paused = True
            case Unpause():
                self._paused = False
            case Stop():
                self._stop = message.id
                return
            case Checkpoint() if self._step:
                self._kept.add(self._step)
                self._save()
                self.send(CheckpointKept(step=self._step))
            case Checkpoint() | Probe():
                self.send(Rejected(id=message.id, reason="nothing to save"))
                return
            case Undo() if not self._undoable:
                self.send(Rejected(id=message.id, reason="there is no change to undo"))
                return
            case Undo():
                changes = self._command({c.key: c.old for c in self._undoable.pop()})
            case SettingCommand() as command:
                now = settings_of(self._config)
                changes = self._command(check_settings(now, command.new_values(now)))
                if have_effect(changes):
                    self._undoable.append(changes)
            case command:
                raise CommandRejectedError(f"a rank without a model cannot {command.name()}")
        self.send(Applied(id=message.id, step=self._step + 1, changes=changes))

    def _command(self, values: dict[str, Any]) -> list[SettingChange]:
        self._to_repeat = [
            msgspec.structs.replace(r, changes=[c for c in r.changes if c.key not in values])
            for r in self._to_repeat
        ]
        return self._set(values)

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self) -> None:
        final = checkpoint_path(self._session.checkpoints, self._step)
        if self._step in complete_checkpoints(self._session.checkpoints) and (
            self._step in self._branch
        ):
            return
        part = final.with_name(f".{final.name}.part")
        for old in self._session.checkpoints.glob(".*step-*"):
            shutil.rmtree(old)
        part.mkdir()
        (part / "weights").write_text(self._weights)
        content = {
            "state": {"step": self._step, "settings": self._after_step},
            "hashes": {"weights": sha256(part / "weights")},
        }
        (part / "state.json").write_text(json.dumps(content))
        if final.exists():
            final.rename(final.with_name(f".{final.name}.old"))
        part.rename(final)
        self.send(CheckpointWritten(step=self._step, size=1, score=1.0, kl=0.5))
        self._take(self._step)
        mark_complete(final)
        self._branch.add(self._step)
        found = complete_checkpoints(self._session.checkpoints)
        counted = [s for s in found if s in self._branch and s not in self._kept]
        removed = [s for s in counted if s <= self._step][: -self._config.train.keep_last]
        self.send(CheckpointComplete(step=self._step, removed=removed))
        confirm = self._take(self._step)
        for step in [step for step in removed if step not in confirm.needed]:
            folder = checkpoint_path(self._session.checkpoints, step)
            (folder / "COMPLETE").unlink()
            shutil.rmtree(folder)


def next_weights(weights: str, step: int, settings: dict[str, Any]) -> str:
    """The sum that follows from a step with these settings."""
    text = f"{weights}|{step}|{json.dumps(settings, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()


def score(weights: str) -> float:
    """A metric that depends on all steps so far."""
    return int(weights[:8], 16) / 2**32


def main() -> None:
    """What engine.launch.rank calls. With several machines, the ranks of the others only wait."""
    kind, _, address = os.environ[STORE_VARIABLE].partition(":")
    store = None
    if kind == "tcp":
        store = StoreClient(address, os.environ[SECRET_VARIABLE].encode())
    if store is not None and SOCKET_VARIABLE not in os.environ:
        store.wait([ENDED], 600)
        return
    LightRank(SessionFolder(Path(sys.argv[1]))).train()
    if store is not None:
        store.request(SetKeys(values={ENDED: b""}))
