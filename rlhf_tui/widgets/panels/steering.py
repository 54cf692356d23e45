"""The steering panel: beta and its source, the controller's next value, and recent commands."""

import math

import msgspec

from engine import metrics
from engine.journal.rows import CommandRow
from engine.kl import MAX_ERROR, next_beta
from engine.protocol.commands import Rollback
from rlhf_tui import format as fmt
from rlhf_tui.format import value_text
from rlhf_tui.state.steering_target import settings_in_force
from rlhf_tui.state.time_left import about
from rlhf_tui.state.timeline import command_text, outcome_text
from rlhf_tui.widgets.lines import Piece, Row, justified, row_width
from rlhf_tui.widgets.panels.panel import Panel, heading

OTHER_SETTINGS = (
    ("learning_rate", "lr"), ("clip_range", "clip"), ("epochs", "epochs"),
    ("temperature", "temp"), ("max_new_tokens", "length"), ("stop_kl", "stop KL"),
    ("save_every", "save every"), ("horizon", "horizon"),
)  # fmt: skip
LABEL_WIDTH = 9
MIN_TEXT_WIDTH = 16
"""Cells of a command that are kept before its outcome, which is cut only if it is very long."""
STATUS_MARKS = {
    "queued": ("⧗", "warn"),
    "accepted": ("⧗", "warn"),
    "applied": ("✓", "good"),
    "rejected": ("✗", "bad"),
}
"""Mark and tone by the status of a command."""


class SteeringPanel(Panel):
    """The settings in force and the newest commands."""

    read_only = False

    def rows(self, width: int, height: int) -> list[Row]:
        """The most important lines first. A pending command always has a line."""
        state = self.state
        top = heading("Steering", self._keys(width), width)
        if not state.head.settings and not state.starting:
            status = state.unread or "settings not known yet"
            return [top, [(f" {status}", "dim")]]
        commands = [self._command(c, width) for c in self._recent()]
        if state.starting:
            # The settings in the journal are those of the last step of the last attempt, which
            # may be on an abandoned branch. Those in force are known once the models are loaded.
            return [top, *self._starting(), *commands[: max(height - 3, 0)]]
        body = [self._beta(width), self._kl(width), self._next(width), *self._others(width)]
        room = max(height - 1 - min(len(commands), 1 if height < 8 else 5), 3)
        body = body[:room]
        return [top, *body, *commands[: max(height - 1 - len(body), 0)]]

    def _keys(self, width: int) -> str:
        """The keys that act now: none without an engine."""
        if self.read_only:
            return "read-only"
        if not self.state.live or self.state.starting:
            return ""
        return "b  [ ]  a  u  e" if width < 50 else "b set  [ ] ±10%  a adaptive  u undo"

    def _starting(self) -> list[Row]:
        attempts = self.state.head.attempts
        step = attempts[-1].from_step if attempts else 0
        text = f"restarting from step {step}" if len(attempts) > 1 else "starting"
        return [[(f" {text} …", "")], [(" beta and settings: once it is loaded", "dim")]]

    def _beta(self, width: int) -> Row:
        state = self.state
        beta = state.setting("beta")
        source = "reading …" if state.steps_unread else state.timeline.beta_source(short=width < 50)
        return [
            *_label("beta"),
            (f"{fmt.number(beta, 4):<8}", "strong"),
            (f" {state.setting('controller')}", "accent"),
            (f" · {source}", "dim"),
        ]

    def _kl(self, width: int) -> Row:
        state = self.state
        kl, target = state.curves.series(metrics.KL).last, state.setting("target")
        row: list[Piece] = [*_label("KL"), (f"{fmt.number(kl, 2):<8}", "strong")]
        if kl is not None and target:
            ratio = kl / target
            arrow, tone = (
                ("▲", "warn") if ratio > 1.2 else ("▼", "warn") if ratio < 0.8 else ("•", "good")
            )
            row += [(f" {arrow} {ratio:z.2f}×", tone)]
        row.append((f" target {value_text(target)}", "dim"))
        return [*row, (" nats", "dim")] if row_width(row) + len(" nats") <= width else row

    def _next(self, width: int) -> Row:
        now, batch_size = settings_in_force(self.state.head.settings), self.state.batch_size
        kl = self.state.curves.series(metrics.KL).last
        row: list[Piece] = [*_label("next")]
        if now is None or kl is None:
            reason = "the last step has no KL"
            if self.state.steps_unread:
                reason = "reading …"
            elif not self.state.head.step:
                reason = "after the first step"
            return [*row, (reason, "dim")]
        if batch_size is None:
            return [*row, ("config.yaml is not read", "dim")]
        if now.controller == "fixed":
            adaptive = next_beta(
                msgspec.structs.replace(now, controller="adaptive"), kl, batch_size
            )
            text = " adaptive: " if width < 50 else " unchanged; adaptive would give "
            text += fmt.number(adaptive, 4)
            return [*row, (f"{fmt.number(now.beta, 4):<8}", ""), (text, "dim")]
        new = next_beta(now, kl, batch_size)
        change = new / now.beta - 1 if now.beta else 0.0
        row += [(f"{fmt.number(new, 4):<8}", ""), (f" {_percent(change)}", "accent")]
        if new in (now.beta_min, now.beta_max):
            return [*row, (" at its bound", "warn")]
        if abs(kl / now.target - 1) >= MAX_ERROR:
            return [*row, (self._saturated(change, width), "warn")]
        return row

    def _saturated(self, change: float, width: int) -> str:
        """At the maximum rate: the number of steps in which beta would double or halve."""
        up = change > 0
        steps = math.log(2 if up else 0.5) / math.log1p(change) if change else math.inf
        if width >= 50 and math.isfinite(steps):
            return f" saturated: {'×2' if up else '×½'} in {math.ceil(steps):,} steps"
        left = self.state.head.total_steps - self.state.head.step
        return " too slow" if self.state.live and steps > left else " saturated"

    def _others(self, width: int) -> list[Row]:
        rows: list[list[Piece]] = [[*_label("other")]]
        for key, name in OTHER_SETTINGS:
            value = value_text(self.state.setting(key))
            if row_width(rows[-1]) + len(name) + len(value) + 3 > width:
                rows.append([*_label("")])
            rows[-1] += [(f"{name} ", "dim"), (f"{value}  ", "")]
        return [*rows]

    def _recent(self) -> list[CommandRow]:
        """Pending commands, then the newest of the ended ones."""
        pending = self.state.timeline.pending()
        ended = [c for c in self.state.timeline.commands if c not in pending]
        ended.sort(key=lambda c: c.ended or 0, reverse=True)
        return [*pending, *ended[:8]]

    def _command(self, command: CommandRow, width: int) -> Row:
        status = command.status
        mark, tone = STATUS_MARKS.get(status, ("?", "warn"))
        abandoned = not command.live and command.command != Rollback.name()
        outcome = f"{mark} {status}"
        if status == "applied":
            outcome = f"{mark} {outcome_text(command.command, command.applied_step)}"
        elif status in ("queued", "accepted"):
            if wait := about(self.state.boundary_in()):
                outcome += f", at step {self.state.head.step + 2} in {wait}"
        elif status == "rejected":
            outcome += f": {command.reason}"
        text = command_text(command)
        if width < 50:
            for key, name in OTHER_SETTINGS:
                text = text.replace(f"{key} ", f"{name} ")
            outcome = outcome.replace("applied at ", "").replace(f"{status}, at step", "at step")
            outcome = outcome.replace("paused ", "").replace("stopped ", "")
        if abandoned:
            outcome, tone = f"{outcome}, abandoned", "dim"
        row: Row = [(f" {text}", ""), (f"  {outcome}", tone)]
        if row_width(row) <= width or width - len(outcome) < MIN_TEXT_WIDTH:
            return row
        return justified([(f" {text}", "")], [(f" {outcome}", tone)], width)


def _percent(change: float) -> str:
    """A relative change in percent: `+1.5%`, `-0.03%`."""
    size = abs(change)
    digits = 1 if size >= 0.001 or size == 0 else 2 if size >= 0.0001 else 3
    return f"{change:+.{digits}%}"


def _label(text: str) -> list[Piece]:
    return [(f" {text:<{LABEL_WIDTH - 1}}", "dim")]
