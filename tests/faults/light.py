"""Hundreds of kills of supervisors, ranks and clients around ranks without a model.

All commands that change settings are sent, at random. At the end the history is computed again from
the commands in the journal: every step must have had the settings, and the "weights", that follow.
"""

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from engine.config.settings import settings_of
from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.reader import JournalReader
from engine.journal.rows import CommandRow
from engine.launch.start_checkpoints import last_checkpoint
from engine.protocol.commands import (
    AnyCommand,
    Checkpoint,
    Note,
    Pause,
    Rollback,
    SetBeta,
    SetKLController,
    SetSetting,
    Undo,
    Unpause,
)
from engine.session.checkpoints import checkpoint_path, complete_checkpoints
from tests.faults.lab import WAIT, FaultRun, LostError
from tests.faults.light_rank import next_weights, score
from tests.faults.points import LIGHT_POINTS, Point
from tests.faults.table import Table
from tests.waiting import until

ENVIRONMENT = {"RLHF_TUI_TEST_LIGHT": "0.02"}


class LightKills:
    """Kills one session of light ranks again and again."""

    def __init__(self, root: Path, table: Table, rng: random.Random, steps: int) -> None:
        self._table, self._rng = table, rng
        self.run = FaultRun(root, f"light-{rng.random():.9f}"[:20], steps=steps)

    def kill(self, point: Point | None, lives: int = 0) -> None:
        """One life: start, random commands, a kill at a point or a random moment, all checks."""
        run, rng = self.run, self._rng
        marker = run.place / f"marker-{time.monotonic_ns()}-{lives}"
        added = {} if point is None else {"RLHF_TUI_TEST_POINT": point.text(str(marker))}
        run.start(ENVIRONMENT | added)
        kind, fault = "light: kill of the supervisor, random", ""
        moment = time.monotonic() + rng.uniform(0, 1.5)
        while time.monotonic() < (moment if point is None else moment + 15):
            if run.is_over() or marker.exists():
                break
            run.send(self._command(), 0.3)
            with contextlib.suppress(Exception):
                run.label_one()
        if point is not None:
            kind = f"light: {point.kind}" if marker.exists() else kind
            fault = f"{point.when} {point.place}"
        elif rng.random() < 0.3 and (ranks := run.ranks()):
            kind = "light: kill of the rank, random"
            with contextlib.suppress(psutil.Error):
                ranks[0].kill()
        if run.session.is_live() and ("rank" in kind or point is not None):
            before = run.step()
            until(
                lambda: run.step() > before or run.is_over() or run.state() == "paused",
                "another step", WAIT,
            )  # fmt: skip
        run.kill_engine()
        self._table.count(kind, fault, self.check)

    def finish(self) -> None:
        """Resumes to the end."""
        run = self.run
        run.start(ENVIRONMENT)
        until(lambda: run.state() in ("paused", "running", "finished"), "a start", WAIT)
        while run.state() == "paused":
            run.send_unpause()
            time.sleep(0.1)
        run.finish()
        self._table.count("light: whole runs, history computed again", "", self.check)

    def _command(self) -> AnyCommand:
        rng = self._rng
        steps = list(complete_checkpoints(self.run.session.checkpoints))
        if steps and rng.random() < 0.03:
            return Rollback(step=rng.choice(steps))
        return rng.choice(
            [
                SetBeta(value=round(rng.uniform(0.01, 1), 3)),
                SetSetting(key="learning_rate", value=round(rng.uniform(1e-6, 1e-3), 9)),
                SetSetting(key="target", value=round(rng.uniform(1, 9), 2)),
                SetSetting(key="epochs", value=rng.randint(1, 9)),
                SetKLController(
                    controller="fixed",
                    target=round(rng.uniform(1, 9), 2),
                    horizon=rng.randint(9, 99),
                ),
                Undo(), Undo(), Note(text="a note"), Checkpoint(), Pause(), Unpause(), Unpause(),
            ]
        )  # fmt: skip

    def check(self) -> None:
        """What holds for every run, and the history computed again."""
        self.run.check()
        with JournalReader(self.run.session) as reader:
            rows = {row.step: row.values for row in reader.metrics.rows()}
            commands = [c for c in reader.commands() if c.live and c.changes and c.applied_step]
            order = application_order(reader)
        check_history(settings_of(self.run.session.config()), rows, commands, order)
        last = last_checkpoint(self.run.session)  # not one of an abandoned branch
        if last in rows:
            folder = checkpoint_path(self.run.session.checkpoints, last)
            saved = score((folder / "weights").read_text())
            if saved != rows[last]["objective/scores"]:
                raise LostError(f"the weights of step {last} are not those of its row")


def check_history(
    initial: Any, rows: dict[int, Any], commands: list[CommandRow], order: dict[str, int]
) -> None:
    """Computes every step's settings and weights from the commands, and compares with the rows."""
    values, weights = msgspec.structs.asdict(initial), ""
    names = {"beta": "objective/kl_coef", "learning_rate": "lr", "target": "target"}
    commands = sorted(commands, key=lambda c: (c.applied_step, order[c.id]))
    for step in sorted(rows):
        for command in commands:
            if command.applied_step == step:
                values |= {c.key: c.new for c in command.changes}
        for name, metric in names.items():
            if values[name] != rows[step][metric]:
                raise LostError(
                    f"step {step} had {name} = {rows[step][metric]}, history: {values[name]}"
                )
        weights = next_weights(weights, step, values)
        if score(weights) != rows[step]["objective/scores"]:
            raise LostError(f"the weights of step {step} do not follow from its history")


def application_order(reader: JournalReader) -> dict[str, int]:
    """Id → position in the order of application."""
    database = ReadOnlyDatabase(reader.session.journal_file, schema.JOURNAL)
    with contextlib.closing(database):
        return {i: n or 0 for i, n in database.rows("SELECT id, applied_seq FROM commands")}


def light_kills(root: Path, table: Table, rng: random.Random, kills: int, steps: int = 400) -> None:
    """So many kills; every point once, the rest at random moments."""
    points: list[Point | None] = [*rng.sample(LIGHT_POINTS, len(LIGHT_POINTS))]
    plan = (points + [None] * kills)[:kills]
    rng.shuffle(plan)
    current = LightKills(root, table, rng, steps)
    try:
        for number, point in enumerate(plan):
            if current.run.state() == "finished" or current.run.step() > steps - 20:
                current.finish()
                current = LightKills(root, table, rng, steps)
            current.kill(point, number)
        current.finish()
    finally:
        current.run.end()
