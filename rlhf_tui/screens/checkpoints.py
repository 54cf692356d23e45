"""Checkpoints: save, roll back, fork, export."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container

from engine.journal.rows import AlertEvent, CheckpointRow
from engine.metrics import SCORE, describe, title_of
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.output_file import is_free
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.parts.panel_placement import place_panel
from rlhf_tui.state.checkpoint_details import read_details
from rlhf_tui.state.messages import CheckpointRead, HeaderSelected, RowHighlighted, RowSelected
from rlhf_tui.widgets.lines import Lines, Piece, Row
from rlhf_tui.widgets.panels.checkpoint import CheckpointPanel
from rlhf_tui.widgets.table import Column, Table, sortable
from rlhf_tui.widgets.wrap import wrap

TARGET_TAKEN = "it exists already; give a new or empty folder"
"""What is wrong with the folder of an export."""
MAX_LINES = 3
"""Of a text about a checkpoint that could not be saved."""
OF_CHECKPOINTS = "checkpoint"
"""Rule of the notices about checkpoints that could not be saved or read."""
ABANDONED = "of an abandoned branch: the run has continued from an earlier step"
ORDERS: dict[str, Callable[[CheckpointRow], float]] = {
    "step": lambda c: c.step,
    "attempt": lambda c: c.attempt,
    "saved": lambda c: c.time,
    "size": lambda c: c.size,
    "score": lambda c: sortable(c.score),
    "KL": lambda c: sortable(c.kl),
}
"""Title of a column → what it sorts by."""


class CheckpointsScreen(SessionScreen):
    """Lists the checkpoints; the screen of the key 4."""

    MODE = "checkpoints"
    WRITES = frozenset({"roll_back", "fork", "export", "delete_checkpoint"})
    READ_ONLY = "checkpoints can only be listed"
    AUTO_FOCUS = "Table"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "roll_back", "roll back"),
        Binding("f", "fork", "fork"),
        Binding("E", "export", "export"),
        Binding("d,delete", "delete_checkpoint", "delete"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._reasons: dict[tuple[int, int], list[str]] = {}
        """Why a checkpoint stays, by step and attempt."""
        self._read: tuple[str, CheckpointRow] | None = None
        """The folder and the checkpoint whose details were read last."""

    def compose_body(self) -> ComposeResult:
        """A line about them, see :meth:`_show_line`; table and panel."""
        yield Lines(id="best")
        with Container(id="checkpoint-panes"):
            yield Table(
                [
                    Column("step", 7, right=True),
                    Column("attempt", 7, right=True, hidden_below=90),
                    Column("saved", 12),
                    Column("size", 8, right=True, hidden_below=74),
                    Column("score", 7, right=True),
                    Column("KL", 7, right=True),
                    Column("", 16, flexible=True),
                ],
                id="checkpoints",
            )
            yield CheckpointPanel(self.context.state, self.context.preferences.metrics())

    def on_resize(self) -> None:
        """Wraps the line above the table, and shows the selected checkpoint if there is room."""
        self.refresh_content()

    def _fit(self) -> None:
        """Puts the panel beside or below the table; an empty table has none."""
        place_panel(self.query_one("#checkpoint-panes"), self.query_one(Table), self.size)

    def refresh_content(self) -> None:
        """Shows the checkpoints, newest step first unless a title was clicked."""
        table = self.query_one(Table)
        self.query_one(CheckpointPanel).charts = self.context.preferences.metrics()
        found = self.context.state.checkpoints
        current = [c for c in found if c.status == "complete"]
        measured = [c for c in current if self._best_value(c) is not None]
        best = max(measured, key=lambda c: (sortable(self._best_value(c)), c.step), default=None)
        last = self._last()
        order = ORDERS[table.sorted_by or "step"]
        ordered = sorted(found, key=lambda c: (order(c), c.step, c.attempt))
        before, alert = self._before_alert(current)
        rows = []
        for c in ordered:
            remarks = ["last"] if c is last else []
            remarks += [self._remark] if c is best else []
            remarks += [f"before alert @{alert}"] if c is before else []
            remarks += ["kept"] if c.kept else []
            rows.append(((c.step, c.attempt), _cells(c, remarks)))
        self._reasons = self._why_kept(current, last, best, before, alert)
        table.set_rows(rows[::-1] if table.descending else rows, self._empty())
        self._show_line(best)
        self._fit()
        self._show_selected()

    def _why_kept(
        self,
        current: list[CheckpointRow],
        last: CheckpointRow | None,
        best: CheckpointRow | None,
        before: CheckpointRow | None,
        alert: int,
    ) -> dict[tuple[int, int], list[str]]:
        """Why each checkpoint of the current timeline stays, as `train.keep_last` and others say.

        Args:
            current: all of them.
            last: the last one, from which a resume continues.
            best: the best one by `train.best_metric`.
            before: the newest one before the first alert that has any before it.
            alert: the step of that alert.
        """
        state = self.context.state
        counted = sorted((c for c in current if not c.kept), key=lambda c: -c.step)
        reasons: dict[tuple[int, int], list[str]] = {}
        for c in current:
            why = reasons[c.step, c.attempt] = []
            if c.kept:
                why.append("kept: it was saved by a command and stays until it is deleted")
            if c is last:
                why.append("last: a resume continues from it")
            if c is best:
                why.append(f"best {title_of(state.best_metric)}: stays until another one is better")
            if c is before:
                why.append(f"the newest before the first alert, of step {alert}")
            if not state.keep_last or c.kept:
                continue
            left = state.keep_last - counted.index(c)
            if left > 0 and c is not best:
                saves = "the next save" if left == 1 else f"{left} more saves"
                newest = f"one of the newest {state.keep_last}" if state.keep_last > 1 else "newest"
                why.append(f"{newest}: stays until {saves}")
            elif not why and state.keep_best > 1:
                why.append(f"one of the best {state.keep_best}")
        return reasons

    def _show_selected(self) -> None:
        """Shows the highlighted checkpoint, and reads its details unless they were read."""
        found, session = self._highlighted(), self.context.session
        panel = self.query_one(CheckpointPanel)
        key = (found.step, found.attempt) if found is not None else (0, 0)
        panel.select(found, self._reasons.get(key, [ABANDONED]))
        shown = self.query_one("#checkpoint-panes").classes & {"beside", "below"}
        if found is None or session is None or not shown:
            return
        folder = str(session.folder)
        if self._read == (folder, found):
            return
        self._read = folder, found

        def read() -> CheckpointRead:
            return CheckpointRead(folder, read_details(session, found))

        self.read_in_thread("checkpoint", read)

    def on_checkpoint_read(self, message: CheckpointRead) -> None:
        """Shows the details of a checkpoint."""
        session = self.context.session
        if session is not None and str(session.folder) == message.folder:
            self.query_one(CheckpointPanel).take(message.details)

    def session_changed(self) -> None:
        """Reads details of the other session."""
        self._read = None

    def _last(self) -> CheckpointRow | None:
        """The last checkpoint of the current timeline."""
        current = [c for c in self.context.state.checkpoints if c.status == "complete"]
        return max(current, key=lambda c: c.step, default=None)

    def _best_value(self, checkpoint: CheckpointRow) -> float | None:
        """The value by which `train.keep_best` compares a checkpoint of the current timeline."""
        metric = self.context.state.best_metric
        if metric == SCORE:
            return checkpoint.score
        return self.context.state.curves.series(metric).at(checkpoint.step)

    def _before_alert(self, current: list[CheckpointRow]) -> tuple[CheckpointRow | None, int]:
        """The newest checkpoint before the first alert of a guard rail, and the alert's step.

        Of the first alert that has a checkpoint before it, as `train.keep_before_alert` selects.
        """
        for marker in self.context.state.timeline.markers():
            alert = marker.event.payload if marker.event is not None else None
            if isinstance(alert, AlertEvent) and alert.count and not marker.abandoned:
                older = [c for c in current if c.step < marker.step]
                if older:
                    return max(older, key=lambda c: c.step), marker.step
        return None, 0

    @property
    def _remark(self) -> str:
        """The remark on the best checkpoint. A metric without a column is named above the table."""
        return "best score" if self.context.state.best_metric == SCORE else "best"

    def _unsaved(self) -> str:
        """Why no checkpoint was saved since the last one; empty if nothing went wrong."""
        last = self._last()
        for event in reversed(self.context.state.timeline.events):
            if last is not None and event.time <= last.time:
                break
            if isinstance(event.payload, AlertEvent) and event.payload.rule == OF_CHECKPOINTS:
                return f"! step {event.step}: {event.payload.text}"
        return ""

    def _show_line(self, best: CheckpointRow | None) -> None:
        """Shows above the table what went wrong, or else the metric that decides the best one."""
        line, metric = self.query_one("#best", Lines), self.context.state.best_metric
        problem = wrap(self._unsaved(), self.size.width - 2)[:MAX_LINES]
        line.styles.height = len(problem)
        if problem[0]:
            line.display = True
            line.show([[(f" {text}", "warn")] for text in problem])
            return
        line.display = metric != SCORE and bool(self.context.state.checkpoints)
        row: Row = [(" no checkpoint has a value of ", "dim"), (title_of(metric), "")]
        if best is not None:
            interval = describe(metric).interval
            half = self.context.state.curves.series(interval).at(best.step) if interval else None
            row = [
                (" best by ", "dim"), (title_of(metric), "strong"), (": step ", "dim"),
                (str(best.step), "good"), (", ", "dim"),
                (fmt.with_interval(self._best_value(best), half), "good"),
            ]  # fmt: skip
        line.show([[*row, (f"   train.best_metric: {metric}", "dim")]])

    def on_header_selected(self, message: HeaderSelected) -> None:
        """Sorts by the column whose title was clicked; again reverses the order."""
        table = self.query_one(Table)
        again = message.title == (table.sorted_by or "step")
        table.descending = not (again and table.descending)
        table.sorted_by = message.title
        self.refresh_content()

    def _empty(self) -> list[Row]:
        if unread := self.context.state.unread:
            return [[(f" {unread}", "dim")]]
        every = self.context.state.setting("save_every")
        saved = f"one is saved every {every} steps" if every else "one is saved at the end"
        hint: list[Piece] = [(f" {saved}", "dim")]
        if self.context.state.live and self.context.steers:
            hint += [("; ", "dim"), ("c", "key"), (" saves one after the current step", "dim")]
        return [[(" no checkpoint yet", "dim")], hint]

    # -- keys ----------------------------------------------------------------------------------

    def why_disabled(self, action: str) -> str:
        """Why the selected checkpoint does not allow an action."""
        if reason := super().why_disabled(action):
            return reason
        if action not in self.WRITES:
            return ""
        found = self._highlighted()
        if found is None:
            return self.context.state.unread or "no checkpoint yet"
        if action == "delete_checkpoint":
            needed = "the last checkpoint cannot be deleted: a resume continues from it"
            return needed if found is self._last() else ""
        return "" if found.status == "complete" else "this checkpoint is of an abandoned branch"

    def on_row_highlighted(self, message: RowHighlighted) -> None:
        """Shows the checkpoint, and the keys that can act on it."""
        self._show_selected()
        self.refresh_keys()

    def _highlighted(self) -> CheckpointRow | None:
        """The checkpoint under the cursor."""
        key = self.query_one(Table).key
        return next((c for c in self.context.state.checkpoints if (c.step, c.attempt) == key), None)

    def action_roll_back(self) -> None:
        """Rolls back: by a command to the engine, or by a resume if none runs."""
        found, target = self._highlighted(), self.steering_target()
        if found is None or target is None:
            return
        name, step = target.name, found.step

        def resume(reseed: bool) -> None:
            seed = ["--reseed"] if reseed else []
            self.context.engines.start(["resume", name, "--from", str(step), *seed], name)

        if target.session.may_be_live():
            self.context.steering.roll_back(target, step, resume)
        elif step < target.step:
            self.context.steering.ask_roll_back(target, step, resume)
        else:
            self.context.engines.ask_resume(name, step)

    def action_fork(self) -> None:
        """Forks a session from the checkpoint."""
        if (found := self._highlighted()) is not None:
            self.context.engines.ask_fork(self.context.state.name, found.step)

    def action_delete_checkpoint(self) -> None:
        """Asks, then deletes the checkpoint: by a command to the engine, if one runs."""
        found, target = self._highlighted(), self.steering_target()
        if found is None or target is None:
            return
        step, arguments = found.step, ["rm", target.name, "--checkpoint", str(found.step), "-y"]

        def delete() -> None:
            self.context.engines.run_command(arguments, f"the checkpoint of step {step} is deleted")

        self.context.steering.delete_checkpoint(target, found, delete)

    def action_export(self) -> None:
        """Exports the policy as a model folder."""
        if (found := self._highlighted()) is None:
            return
        name, step = self.context.state.name, found.step
        target = str(Path.cwd() / f"{name}-step-{step}")
        rows: list[Row] = [[(f"The policy of step {step} as a Hugging Face model folder.", "dim")]]

        def check(text: str) -> tuple[bool, str]:
            taken = not is_free(Path(os.path.expanduser(text.strip())))  # noqa: PTH111 - as below
            return bool(text.strip()) and not taken, TARGET_TAKEN if text.strip() and taken else ""

        def take(text: str | None) -> None:
            if text:
                folder = os.path.expanduser(text)  # noqa: PTH111 - Path raises for an unknown user
                self.context.say(f"exporting the policy of step {step} to {folder}")
                self.context.engines.run_command(
                    ["export", name, "--policy", folder, "--step", str(step)],
                    f"the policy of step {step} is in {folder}",
                )

        dialog = InputDialog(f"Export {name} to", rows, target, check, verb="export")
        self.app.push_screen(dialog, take)

    @on(RowSelected)
    def _enter(self) -> None:
        if reason := self.why_disabled("roll_back"):
            self.context.say(reason)
            return
        deletes = "" if self.why_disabled("delete_checkpoint") else ", d deletes it"
        keys = f"r rolls back to it, f forks from it, E exports its policy{deletes}"
        self.context.say(keys)


def _cells(c: CheckpointRow, remarks: list[str]) -> list[Piece]:
    """The cells of a row."""
    if c.status == "superseded":
        remarks = ["abandoned branch"]
    dim = "dim" if c.status == "superseded" else ""
    return [
        (str(c.step), dim or "strong"),
        (str(c.attempt), "dim"),
        (fmt.time_of_day(c.time), "dim"),
        (fmt.size(c.size), dim),
        (fmt.number(c.score), dim or "strong"),
        (fmt.number(c.kl, 2), dim),
        (", ".join(remarks), "dim" if dim else "good"),
    ]
