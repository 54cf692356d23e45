"""The two top lines of every screen: the tabs, and the status of the run."""

from rich.cells import cell_len

from engine import metrics
from rlhf_tui import format as fmt
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import SEE_LOG, in_app
from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Piece, Row, justified, row_width, shorten, shorten_middle
from rlhf_tui.widgets.panels.panel import Panel, bar

STATE_MARKS = {
    "starting": ("○", "accent"),
    "running": ("●", "good"),
    "pausing": ("◐", "warn"),
    "paused": ("‖", "warn"),
    "waiting": ("⧗", "warn"),
    "stopping": ("◐", "warn"),
    "finished": ("✓", "good"),
    "stopped": ("■", "dim"),
    "failed": ("✗", "bad"),
    "crashed": ("✗", "bad"),
    "unreadable": ("✗", "bad"),
}
"""Mark and tone by state; `waiting` is one that waits for something from outside."""
MIN_NAME_WIDTH = 6
"""Cells that a session's name keeps in a narrow terminal."""


def paused_text(reason: str | None, step: int) -> str:
    """`paused by kl_high at step 4: KL 7.26 > 6`, or `paused after step 4` without a reason."""
    return f"paused by {reason}" if reason else f"paused after step {step}"


class Tabs(Panel):
    """The screens with their keys, and the session's name and state."""

    def __init__(self, state: SessionState, here: str, modes: tuple[str, ...]) -> None:
        """`here` is the mode of the screen, one of `modes`."""
        super().__init__(state, id="tabs")
        self.here = here
        self.modes = modes
        self._room = 0
        """Cells of the tabs at the last rendering."""

    def rows(self, width: int, height: int) -> list[Row]:
        """One line."""
        right = self._session(width)
        self._room = width - row_width(right)
        return [justified(self._tabs(self._room), right, width)]

    def _session(self, width: int) -> Row:
        """The session's name, cut if it is too long, and its state."""
        state = self.state
        if not state.name:
            return []
        shown = "waiting" if state.waiting else state.head.state
        if state.unread:
            shown = "unreadable" if state.problem else ""
        sign, tone = STATE_MARKS.get(shown, ("?", "warn"))
        mark = [*([(f"{sign} {shown}", tone)] if shown else []), (" ", "")]
        name = one_line(state.name)
        room = max(width - row_width(self._tabs(0)) - row_width(mark) - 3, MIN_NAME_WIDTH)
        if cell_len(name) > room:
            name = shorten_middle(name, room)
        return [(f"{name}  ", "strong"), *mark]

    def _tabs(self, width: int) -> Row:
        # If the names do not fit, only this screen's name is shown, and the keys of the others.
        fits = sum(len(mode) + 4 for mode in self.modes) <= width
        tabs: list[Piece] = []
        for number, mode in enumerate(self.modes, start=1):
            here = mode == self.here
            name = f" {mode.capitalize()}" if fits or here else ""
            tabs.append((f" {number}{name} ", "here" if here else "tab"))
        return tabs

    async def on_click(self, event: object) -> None:
        """Shows the screen whose name was clicked."""
        end, x = 0, getattr(event, "x", 0)
        for (text, _), mode in zip(self._tabs(self._room), self.modes, strict=True):
            end += len(text)
            if x < end:
                await self.app.run_action(f"app.go('{mode}')")
                return


class StatusLine(Panel):
    """Step, time left, speed and memory, or why they cannot be read."""

    read_only = False
    resume_key = ""
    """The key that resumes the run, shown if the command has no room: `r`, `r on screen 2`.
    Empty if there is none."""

    def rows(self, width: int, height: int) -> list[Row]:
        """One line."""
        state = self.state
        if state.problem:
            return [[(f" {state.problem}", "bad")]]
        if state.unread:
            return [[(f" {state.unread}", "dim")]]
        head = state.head
        left: list[Piece] = [(" step ", "dim"), (f"{head.step}", "strong")]
        if head.total_steps:
            left += [(f"/{head.total_steps} ", "dim")]
            share = head.step / head.total_steps
            left += [*bar(share, 10 if width < 110 else 20), (f" {share:.0%}", "")]
        room = width - row_width(left[:3]) - 2
        note, tone = self._note(room + 2) or ("", "")
        if note:
            note = shorten(one_line(note), room).rstrip()
            if row_width(left) + cell_len(note) + 2 > width:
                left = left[:3]  # the note is worth more than the bar
            return [justified(left, [(note, tone), (" ", "")], width)]
        return [justified(left, self._facts(width - row_width(left)), width)]

    def _note(self, width: int) -> Piece | None:
        """Why the run does not continue, with the command or the key that resumes it.

        For a copy that is not kept up to date, why not: it may show the run as it no longer is.
        """
        if self.state.stale:
            return self.state.stale, "warn"
        head = self.state.head
        first = head.message.partition("\n")[0]
        if head.state == "finished" and head.step >= head.total_steps:
            return self._with_resume(
                "", width, "extend", "-o", f"train.steps={2 * head.step}"
            ), "dim"
        stopped = self._with_resume(first, width)
        waiting: Piece | None = None
        if self.state.live and not self.state.connected:
            refused = self.state.refused
            waiting = (refused, "warn") if refused else ("connecting to the engine …", "dim")
        return {
            "crashed": (self._with_resume("engine died", width), "bad"),
            "failed": (f"failed: {in_app(first) or SEE_LOG}", "bad"),
            "finished": (stopped, "dim"),
            "stopped": (stopped, "dim"),
            "paused": (self._paused(width), "warn"),
        }.get(head.state, waiting)

    def _with_resume(self, reason: str, width: int, verb: str = "resume", *options: str) -> str:
        """The reason and the command that resumes the run; if it does not fit, the key, if any."""
        before = f"{reason}; " if reason else ""
        text = f"{before}{verb}: {self.state.command('resume', self.state.name, *options)}"
        if len(text) + 2 <= width:
            return text
        return f"{before}{verb} with {self.resume_key}" if self.resume_key else reason

    def _paused(self, width: int) -> str:
        """What paused the run, cut to leave room for step and key; the timeline has all of it."""
        text = one_line(paused_text(self.state.timeline.pause_reason(), self.state.head.step))
        key = "" if self.read_only else "; p unpauses"
        room = max(width - len(key) - 2, 0)
        return (text if cell_len(text) <= room else shorten(text, room)) + key

    def _facts(self, width: int) -> list[Piece]:
        state = self.state
        left, speed = state.seconds_left(), state.curves.recent_mean(metrics.TOKENS_PER_SECOND)
        memory = state.curves.series(metrics.PEAK_MEMORY).last
        facts: list[tuple[str, str]] = []
        if left is not None:
            facts.append((fmt.duration(left), "left"))
        if speed is not None:
            facts.append((f"{speed:,.0f}", "tok/s"))
        if memory is not None:
            facts.append((f"{memory:.1f}", "GB"))
        beta = state.setting("beta")
        if beta is not None and not state.starting:
            facts.append((fmt.number(beta, 4), "beta"))
        if state.head.deadline is not None:
            facts.append((f"saves before {fmt.time_of_day(state.head.deadline)}", ""))
        if len(state.head.attempts) > 1:
            facts.append((str(len(state.head.attempts)), "attempts"))
        pieces: list[Piece] = []
        for value, unit in facts:
            if row_width(pieces) + len(value) + len(unit) + 5 > width:
                break
            pieces += [(f"   {value}", "strong"), (f" {unit}", "dim")]
        return [*pieces, (" ", "")]
