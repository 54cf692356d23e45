"""The engine's own output, searchable."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message

from engine.session.access import open_to_read
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.widgets.lines import Lines, Piece, Row
from rlhf_tui.widgets.panels.log_summary import LogSummary, Problems, line_tone
from rlhf_tui.widgets.scroll_list import ScrollList

MAX_BYTES = 8_000_000
MAX_LINES = 100_000
CHARACTERS_PER_CELL = 4
"""Characters of a line that are looked at, for each cell: a line may have millions."""
READ_INTERVAL = 1.0
NARROW_COLUMNS = 100
"""Below this many columns, a line begins with the time of day instead of date and milliseconds."""
WITH_SUMMARY, LEAST_SUMMARY = 34, 8
"""Minimum height of a screen with a summary, and the lines that it then has beside a long log."""
ABOVE_AND_BELOW = 4
"""Lines of the screen that are neither the log's nor the summary's."""
STAMP = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
"""The time stamp of lines that the engine's loggers write."""
LINE_START = re.compile(r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d(,\d{3})? ((DEBUG|INFO) )?")
"""What is less bright than the rest of a line: its time, and a level that most lines have."""
DATE_AND_TIME = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)(,\d{3})?")


@dataclass(frozen=True)
class LogPart:
    """The result of one reading of a log."""

    lines: list[str]
    """The whole lines."""
    at: int
    """The byte after the last of them."""
    seen: int
    """The byte after everything that need not be read again, such as the beginning of a line."""
    fresh: bool
    """Whether the lines replace all earlier ones."""
    cut: bool = False
    """Whether the log has lines before them that were not read."""


class LogRead(Message):
    """The log of the session in a folder was read; `until`: up to that time."""

    def __init__(self, folder: str, part: LogPart, until: str | None) -> None:
        super().__init__()
        self.folder, self.part, self.until = folder, part, until


class LogView(ScrollList):
    """The lines of the log. If it shows the end, it keeps showing the end."""

    def __init__(self) -> None:
        super().__init__(id="log")
        self.lines: list[str] = []
        self._short: list[str] = []
        """The same lines for a narrow screen."""
        self._date = ""
        """The date of the last line."""
        self.problems = Problems()
        """The warnings and errors of the lines, also of those that were dropped."""
        self.cut = False
        """Whether the log has lines before the first one here."""
        self.hint: list[Row] = []
        self.shift = 0
        self.match: int | None = None
        """The index of the line that a search has led to."""
        self._at_end = True

    def count(self) -> int:
        """The number of lines."""
        return len(self.lines)

    def empty(self) -> list[Row]:
        """The hint in an empty log."""
        return self.hint

    def row(self, index: int, width: int) -> Row:
        """A line from the column it is shifted to; a level decides its tone."""
        line = (self._short if width < NARROW_COLUMNS else self.lines)[index]
        tone = line_tone(self.lines[index])
        sign = ("▸", "accent") if index == self.match else (" ", "")
        line = line[: self.shift + CHARACTERS_PER_CELL * width]
        begun = LINE_START.match(line) if not tone else None
        at = max(begun.end(), self.shift) if begun else self.shift
        return [sign, (line[self.shift : at], "dim"), (line[at:], tone)]

    def rows(self, width: int, height: int) -> list[Row]:
        """The visible lines."""
        if self._at_end:
            self.top = max(self.count() - self.page_size, 0)
        return super().rows(width, height)

    def moved(self) -> None:
        """Stores whether the end is visible, to keep it visible when the height changes."""
        self._at_end = self.top >= self.count() - self.page_size

    def add(self, lines: list[str], *, fresh: bool, cut: bool = False) -> None:
        """Appends lines, or with `fresh` replaces all of them. The oldest may be dropped.

        `cut`: the log has lines before these fresh ones.
        """
        if fresh:
            self._date, self.problems = "", Problems()
        self.problems.add(lines)
        short = [self._shortened(line) for line in lines]
        lines, short = (lines, short) if fresh else (self.lines + lines, self._short + short)
        dropped = max(len(lines) - MAX_LINES, 0)
        self.cut = dropped > 0 or (cut if fresh else self.cut)
        self.lines, self._short = lines[dropped:], short[dropped:]
        self._at_end |= fresh
        # The same line as before stays on top, and is the one that the search has led to.
        self.top = max(self.top - dropped, 0)
        if self.match is not None:
            self.match = None if fresh or self.match < dropped else self.match - dropped
        self.update()

    def _shortened(self, line: str) -> str:
        """The line with the time of day alone, and with the date if it is another day's."""
        found = DATE_AND_TIME.match(line)
        if found is None:
            return line
        date, self._date = self._date, found[1]
        day = "" if date == found[1] else f"{found[1]} "
        return f"{day}{found[2]}{line[found.end() :]}"


class LogScreen(SessionScreen):
    """Shows the log; the screen of the key 5."""

    MODE = "log"
    AUTO_FOCUS = "LogView"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "search", "search"),
        Binding("n", "match(1)", "next"),
        Binding("N", "match(-1)", "previous"),
        Binding("right,l", "shift(20)", "right", show=False),
        Binding("left,h", "shift(-20)", "left", show=False),
        Binding("escape", "back", "clear search", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._folder = ""
        self._at = self._seen = 0
        self._until: str | None = None
        self._query = ""

    def compose_body(self) -> ComposeResult:
        """The log with a line about it."""
        yield Lines(id="about")
        yield LogView()
        yield LogSummary(self.context.state)

    def on_mount(self) -> None:
        """Reads new lines every second."""
        self.set_interval(READ_INTERVAL, self.read_more)

    def on_resize(self) -> None:
        """Gives the summary its height."""
        self._summarise()

    def refresh_content(self) -> None:
        """Reads new lines when the screen becomes visible."""
        self.read_more()
        self._about()

    def _summarise(self) -> None:
        """Shows the summary in the room that the log leaves, or a few lines of it."""
        view, summary = self.query_one(LogView), self.query_one(LogSummary)
        height = self.size.height
        summary.display = height >= WITH_SUMMARY and view.count() > 0
        if not summary.display:
            return
        summary.show_problems(view.problems.newest_first())
        left = height - ABOVE_AND_BELOW - view.count()
        summary.styles.height = min(summary.wanted(self.size.width), max(left, LEAST_SUMMARY))

    def read_more(self) -> None:
        """Reads what was appended, in a thread, if the screen is visible."""
        session = self.context.session
        if session is None or not self.is_current:
            return
        another = str(session.folder) != self._folder
        if another:
            self._folder, self._at, self._seen = str(session.folder), 0, 0
        position = session.position
        until = None if position is None else fmt.clock(position.time)
        seen = self._seen if until == self._until else self._at
        path, folder, at = session.log_file, self._folder, self._at

        def read() -> LogRead | None:
            part = read_part(path, at, seen, until)
            return None if part is None else LogRead(folder, part, until)

        self.read_in_thread("log", read, replaces=another)

    def on_log_read(self, message: LogRead) -> None:
        """Shows lines that were read."""
        part = message.part
        if message.folder != self._folder:
            return
        self._seen, self._until = part.seen, message.until
        if part.lines and (part.fresh or part.at > self._at):
            self._at = part.at
            self.query_one(LogView).add(part.lines, fresh=part.fresh, cut=part.cut)
            self._about()

    def session_changed(self) -> None:
        """Drops the log of the last session."""
        self._folder, self._at, self._seen = "", 0, 0
        self.query_one(LogView).add([], fresh=True)

    def _about(self) -> None:
        view = self.query_one(LogView)
        state = self.context.state
        view.hint = [
            [(" the log is empty", "dim")],
            [(" from a shell: ", "dim"), (state.command("logs", state.name), "key")],
        ]
        last = "the last " if view.cut else ""
        row: list[Piece] = [(f" {last}{view.count():,} lines", "dim")]
        if self._query:
            hits, number = self._hits(), "in "
            if view.match is not None and view.match in hits:
                number = f"{hits.index(view.match) + 1:,} of "
            lines = f"  {number}{len(hits):,} lines, n N"
            row += [("   ", ""), (self._query, "match"), (lines, "dim")]
        if view.shift:
            row.append((f"   from column {view.shift + 1}", "dim"))
        self.query_one("#about", Lines).show([row])
        self._summarise()
        view.update()
        self.refresh_keys()

    def why_disabled(self, action: str) -> str:
        """There are no matches before a search."""
        if action == "match" and not self._query:
            return "no search yet: press /"
        return super().why_disabled(action)

    def action_search(self) -> None:
        """Asks for a text to search for."""

        def take(text: str | None) -> None:
            if text is not None:
                self._query = self.query_one(LogView).matching = text
                self.query_one(LogView).match = None
                if text:
                    self.action_match(-1)
                self._about()

        given = self._query
        dialog = InputDialog("Search the log", [], given, lambda _: (True, ""), verb="search")
        self.app.push_screen(dialog, take)

    def _hits(self) -> list[int]:
        """The indices of the lines that contain the searched text."""
        query = self._query.lower()
        return [i for i, line in enumerate(self.query_one(LogView).lines) if query in line.lower()]

    def action_match(self, way: int) -> None:
        """Moves to the next line with the searched text, starting from the last match if visible.

        Otherwise starts from the first or the last visible line: a search begins with the newest.
        """
        view, hits = self.query_one(LogView), self._hits()
        if not hits:
            self.context.say(f"'{self._query}' is not in the log")
            return
        seen = range(view.top, view.top + view.page_size)
        at = seen.start - 1 if way > 0 else seen.stop
        if view.match is not None and view.match in seen:
            at = view.match
        if way > 0:
            view.match = next((i for i in hits if i > at), hits[0])
        else:
            view.match = next((i for i in reversed(hits) if i < at), hits[-1])
        if view.match not in seen:
            view.go(view.match)
        self._about()

    def action_shift(self, by: int) -> None:
        """Moves sideways in long lines."""
        view = self.query_one(LogView)
        view.shift = max(view.shift + by, 0)
        self._about()

    def action_back(self) -> None:
        """Ends the search and moves back to the first column."""
        view = self.query_one(LogView)
        self._query = view.matching = ""
        view.match, view.shift = None, 0
        self._about()


def read_part(path: Path, at: int, seen: int, until: str | None) -> LogPart | None:
    """Reads whole lines of a log; None if nothing is new, or the log cannot be read.

    Args:
        path: of the log.
        at: the byte after the last line that was read.
        seen: :attr:`LogPart.seen` of the last part; `at` to read other lines than until then.
        until: read only lines that were written by this time.
    """
    try:
        size = path.stat().st_size
        if size == seen:
            return None
        fresh = at == 0 or size < at
        begin = max(size - MAX_BYTES, 0) if fresh and until is None else at
        with open_to_read(path) as file:
            file.seek(begin)
            data = file.read(MAX_BYTES)
    except OSError:
        return None
    whole = data.rfind(b"\n") + 1
    end = whole if until is None else written_until(data, until)
    cut = fresh and begin > 0
    first = data.find(b"\n") + 1 if cut else 0
    if first >= end:  # there is no other line
        first = 0
    text = data[first:end].decode("utf-8", "replace")
    if len(data) == MAX_BYTES and not whole:  # a longer line is shown in pieces
        end, text = len(data), data.decode("utf-8", "replace") + "\n"
    lines = [_visible(line) for line in text.split("\n")[:-1]]
    # Behind a line of a later time there is nothing to see until then.
    return LogPart(lines, begin + end, begin + len(data) if end >= whole else size, fresh, cut)


def written_until(data: bytes, until: str) -> int:
    """The bytes of whole lines before the first one of a later time.

    The engine begins its lines with the local time; output of others belongs to the line before.
    """
    end = 0
    for line in data.splitlines(keepends=True):
        stamp = line[: len(until)]
        if not line.endswith(b"\n") or (STAMP.fullmatch(stamp) and stamp > until.encode()):
            break
        end += len(line)
    return end


def _visible(line: str) -> str:
    """The text after the last carriage return: progress bars overwrite themselves."""
    return line.rstrip("\r").rpartition("\r")[2]
