"""Beside a log: its warnings and errors, the attempts, and what happened at what time."""

import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from engine.journal.rows import AttemptRow
from rlhf_tui import format as fmt
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.panels.panel import Panel, heading
from rlhf_tui.widgets.panels.timeline import MIN_STEP_WIDTH, entry_line
from rlhf_tui.widgets.wrap import wrap

LEVELS = {"DEBUG": "", "INFO": "", "WARNING": "warn", "ERROR": "bad", "CRITICAL": "bad"}
"""Level of a line → its tone."""
TRACEBACK = "Traceback (most recent call last)"
MAX_PROBLEMS = 200
"""Different ones that are remembered, the newest."""
TEXT_FROM, LEAST_TEXT, MOST_LINES = 27, 20, 3
"""Column in which the text of a problem begins, minimum cells and maximum lines that it has."""
MIN_ATTEMPTS = 2
"""Lines of attempts that are shown whatever the number of problems."""
_STAMPED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:,\d{3})? (?:([A-Z]+) )?(.*)")


def line_tone(line: str) -> str:
    """The tone of a line of a log: of its level, or else of the words of another program."""
    return _tone(line, _STAMPED.match(line))


def _tone(line: str, stamped: re.Match[str] | None) -> str:
    if stamped is not None and stamped[2] in LEVELS:
        return LEVELS[stamped[2]]
    lower = line.lower()
    if "error" in lower or "traceback" in lower:
        return "bad"
    return "warn" if "warning" in lower else ""


class Problem(Struct):
    """A warning or an error, however often it was logged."""

    text: str
    tone: str
    last: str
    """When it was logged last; empty if the log does not say it."""
    count: int = 0


class Problems:
    """Collects warnings and errors, each text once."""

    def __init__(self) -> None:
        """Of an empty log."""
        self._found: dict[str, Problem] = {}
        self._time = ""
        self._in_traceback = False

    def add(self, lines: Iterable[str]) -> None:
        """Adds those of further lines."""
        for line in lines:
            stamped = _STAMPED.match(line)
            if stamped is not None:
                self._time = stamped[1]
                self._in_traceback = False
                if tone := _tone(line, stamped):
                    self._count(stamped[3], tone)
            elif TRACEBACK in line:
                self._in_traceback = True
            elif self._in_traceback:
                if line.strip() and not line.startswith(" "):
                    self._in_traceback = False
                    self._count(line.strip(), "bad")  # the last line of a traceback is its error
            elif tone := _tone(line, None):
                self._count(line.strip(), tone)

    def _count(self, text: str, tone: str) -> None:
        problem = self._found.pop(text, None) or Problem(text, tone, "")
        problem.count += 1
        problem.last = self._time
        self._found[text] = problem
        if len(self._found) > MAX_PROBLEMS:
            del self._found[next(iter(self._found))]

    def newest_first(self) -> list[Problem]:
        """The problems, by when they were logged last."""
        return list(self._found.values())[::-1]


class LogSummary(Panel):
    """Shows the problems of the log, the attempts, and what happened at what time."""

    def __init__(self, state: SessionState) -> None:
        super().__init__(state, id="log-summary")
        self._problems: Sequence[Problem] = ()

    def show_problems(self, problems: Sequence[Problem]) -> None:
        """Shows the problems of a log, newest first."""
        self._problems = problems
        self.update()

    def wanted(self, width: int) -> int:
        """The lines of all that there is to show, in `width` cells."""
        entries = len(self.state.timeline.folded())
        problems = sum(len(_problem(p, width)) for p in self._problems)
        return 3 + max(problems, 1) + len(self.state.head.attempts) + entries

    def rows(self, width: int, height: int) -> list[Row]:
        """Each section below its heading. The newest attempts are always in sight."""
        attempts, entries = self.state.head.attempts, self.state.timeline.folded()
        room = max(height - 2 - min(len(attempts), MIN_ATTEMPTS), 1)
        problems = [row for p in self._problems for row in _problem(p, width)]
        if len(problems) > room:
            problems = [_begin(p) for p in self._problems]
        problems = problems or [[(" none", "dim")]]
        if len(problems) > room:
            more = len(problems) - room + 1
            problems = [*problems[: room - 1], [(f" … and {more:,} earlier", "dim")]]
        rows = [
            heading("Warnings and errors", "", width),
            *problems,
            heading("Attempts", "", width),
            *self._attempts(attempts)[: max(height - len(problems) - 2, 1)],
        ]
        if entries and height - len(rows) > 1:
            steps = max([MIN_STEP_WIDTH, *(len(str(e[-1].step)) for e in entries)])
            rows.append(heading("What happened", "", width))
            rows += [entry_line(e, width, steps) for e in entries[: height - len(rows)]]
        return rows

    def _attempts(self, attempts: Sequence[AttemptRow]) -> list[Row]:
        """The attempts, newest first: from which step, when, for how long, where."""
        rows: list[Row] = []
        next_began: float | None = None
        for attempt in reversed(attempts):
            ended = attempt.ended if attempt.ended is not None else next_began
            last = next_began is None
            if ended is not None:
                lasted = fmt.duration(ended - attempt.started)
            else:
                lasted = fmt.duration(self.state.now() - attempt.started) if self.state.live else ""
            how = "" if lasted else "killed"
            rows.append([
                (f" {attempt.attempt:>3}", "strong" if last else ""),
                (f"  from step {attempt.from_step:<7,}", ""),
                (f" {fmt.clock(attempt.started)}  {lasted or how:<8}", "dim"),
                (f" supervisor {attempt.pid} on {attempt.host}", "dim"),
            ])  # fmt: skip
            next_began = attempt.started
        return rows


def _begin(problem: Problem, text: str | None = None) -> Row:
    """The line of a problem; `text`: what there is room for, if it has more lines."""
    times = f"{problem.count:>4,}×" if problem.count > 1 else " " * 5
    text = problem.text if text is None else text
    return [(f" {problem.last or ' ' * 19} {times} ", "dim"), (text, problem.tone)]


def _problem(problem: Problem, width: int) -> list[Row]:
    """The whole text of a problem, or its beginning if it is long."""
    first, *more = wrap(problem.text, max(width - TEXT_FROM - 1, LEAST_TEXT))
    if len(more) >= MOST_LINES:
        return [_begin(problem)]
    return [_begin(problem, first), *([(" " * TEXT_FROM + line, problem.tone)] for line in more)]
