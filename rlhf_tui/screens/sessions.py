"""The sessions screen: lists the sessions of a folder; opens, resumes, forks and deletes them."""

import functools
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container

from engine.metrics import title_of
from engine.session.folder import free_name
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import Choice, ChoiceDialog
from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.parts.engine_waits import EngineWaits
from rlhf_tui.screens.parts.highlighted_preview import HighlightedPreview
from rlhf_tui.screens.parts.session_list import (
    ASCENDING,
    MARK,
    NAME_COLUMN,
    SessionColumns,
    line_of_marks,
    lines_about,
    sessions_table,
    short_path,
)
from rlhf_tui.state.messages import (
    EnginesAsked,
    HeaderSelected,
    RowHighlighted,
    RowSelected,
    SessionPreviewed,
    SessionsListed,
)
from rlhf_tui.state.runs.session_row import ListedSession, SessionRow
from rlhf_tui.state.steering_target import NO_SESSION, SteeringTarget
from rlhf_tui.widgets.lines import Lines, Row
from rlhf_tui.widgets.panels.preview import PreviewPanel

FIRST = "my-run.yaml"
"""The configuration of the commands that start a first run."""
READ_INTERVAL = 2.0
"""Seconds between two readings of the folder."""


class SessionsScreen(SessionScreen):
    """Lists the sessions; the screen of the key 1."""

    MODE = "sessions"
    LISTS = True
    WRITES = frozenset({"new", "new_from_file", "resume", "fork", "delete"})
    READ_ONLY = "nothing can be started or deleted"
    AUTO_FOCUS = "Sessions"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "new", "demo"),
        Binding("N", "new_from_file", "new run"),
        Binding("r", "resume", "resume"),
        Binding("f", "fork", "fork"),
        Binding("d,delete", "delete", "delete"),
        Binding("s", "sort", "sort", show=False),
        Binding("R", "reverse", "reverse", show=False),
        Binding("m", "mark_session", "mark", show=False),
        Binding("M", "mark_matching", "mark by a pattern", show=False),
        Binding("O", "overlay", "overlay marked", show=False),
        Binding("i", "metric", "metric", show=False),
        Binding("C", "settings", "settings that differ", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._columns = SessionColumns()
        self._table = sessions_table(self._columns.columns(()))
        self._marked: list[str] = []
        """The names of the marked sessions, in the order in which they were marked."""
        self._rows: dict[str, ListedSession] = {}
        self._listed = False
        self._reading_settings = False
        """Whether the settings that differ were asked for and are still being read."""
        self._waits = EngineWaits(self.post_message)

    @functools.cached_property
    def preview(self) -> HighlightedPreview:
        """The preview of the highlighted session."""
        return HighlightedPreview(self, self.context, self._table)

    def compose_body(self) -> ComposeResult:
        """The table, a few lines about the highlighted session, and its preview."""
        with Container(id="browser"):
            yield self._table
            with Container(id="highlighted"):
                yield Lines(id="about")
                yield PreviewPanel()

    def on_mount(self) -> None:
        """Reads the folder again every two seconds."""
        self._columns.metric = self.context.preferences.listed_metric
        self.read_sessions()
        self.set_interval(READ_INTERVAL, self.read_sessions)

    def refresh_content(self) -> None:
        """Reads the folder when the screen becomes visible."""
        self.read_sessions()

    def read_sessions(self, *, replaces: bool = False) -> None:
        """Reads the folder in a thread, if the screen is visible.

        `replaces`: also if a reading has not ended, because it does not read what is wanted now.
        """
        if not self.is_current:
            return
        context, metric, settings = self.context, self._columns.metric, self._columns.with_settings
        self.read_in_thread(
            "sessions",
            lambda: SessionsListed(context.listing.rows(context.root, metric, settings=settings)),
            replaces=replaces,
        )

    def on_sessions_listed(self, message: SessionsListed) -> None:
        """Shows the rows."""
        self._rows = {s.row.name: s for s in message.rows}
        self._reading_settings = False
        self._waits.ask([s.row for s in message.rows], self.context.now())
        self._rows = self._waits.added_to(self._rows)
        table = self._table
        first, self._listed = not self._listed, True
        self._marked = [name for name in self._marked if name in self._rows]
        self._show_rows(self._how_to_start())
        self.preview.fit()
        if first and self.context.state.name in self._rows:
            table.go(table.keys.index(self.context.state.name))
        self._about()
        self.rows_read()
        for listed in message.rows:
            if listed.row.name != self.context.state.name:  # the follower reads the open session
                self.context.commands.run_read(SteeringTarget.of_row(listed.row))
        self.refresh_keys()

    def _how_to_start(self) -> list[Row]:
        """The text in place of the rows in a folder without sessions."""
        command = self.context.state.command
        return [
            [(f" no sessions in {short_path(self.context.root)}", "dim")],
            [],
            [(" n ", "key"), ("starts the demo: a small model, a few minutes, no downloads", "")],
            [(" N ", "key"), ("starts a run from a configuration file", "")],
            [],
            [(" or from a shell:", "dim")],
            [(f" {command('demo')}", "key")],
            [
                (f" {fmt.command('init', FIRST)}", "key"),
                ("  asks for your model and reward", "dim"),
            ],
            [(f" {command('run', FIRST)}", "key")],
        ]

    def on_engines_asked(self, message: EnginesAsked) -> None:
        """Shows what the engines wait for."""
        self._waits.take(message)
        self._rows = self._waits.added_to(self._rows)
        self._show_rows()
        self._about()

    def _show_rows(self, empty: list[Row] | None = None) -> None:
        """Shows the rows in the order of the table; the cursor stays on its session."""
        now, table, columns = self.context.now(), self._table, self._columns
        sessions = list(self._rows.values())
        compared = [s for s in sessions if s.row.name in self._marked]
        columns.fit(compared if len(compared) > 1 else sessions)
        table.columns = columns.columns(sessions)
        longest = max((len(s.row.name) for s in sessions), default=0) + len(MARK) * bool(compared)
        table.columns[NAME_COLUMN].max_width = max(longest, table.columns[NAME_COLUMN].width)
        order = columns.orders().get(table.sorted_by)
        # Without a column, in the order of the listing.
        rows = sorted(sessions, key=order, reverse=table.descending) if order else sessions
        cells = [
            (s.row.name, columns.cells(s, now, marked=s.row.name in self._marked)) for s in rows
        ]
        table.set_rows(cells, empty)

    def on_header_selected(self, message: HeaderSelected) -> None:
        """Sorts by the column whose title was clicked; again reverses the order."""
        if message.title == self._table.sorted_by:
            self.action_reverse()
        elif message.title in self._columns.orders():
            self._sort_by(message.title)

    def _sort_by(self, title: str) -> None:
        self._table.sorted_by = title
        self._table.descending = title not in ASCENDING
        self._show_rows()

    def on_row_highlighted(self, message: RowHighlighted) -> None:
        """Shows the lines about the highlighted session, and the keys that can act on it."""
        if message.table == "sessions":
            self._about()
            self.refresh_keys()

    def _about(self) -> None:
        row = self._highlighted()
        resume = self.context.state.command("resume", row.name) if row else ""
        lines = lines_about(row, self._table.size.width, resume) if row else []
        if self._marked:
            lines[:1] = [line_of_marks(len(self._marked))]
        if self._reading_settings:  # some milliseconds for each session
            count = fmt.plural(len(self._rows), "session")
            lines[:1] = [[(f" reading the settings of {count} …", "dim")]]
        self.query_one("#about", Lines).show(lines)
        self.preview.ask(self._rows.get(self._table.key or ""))

    def on_resize(self) -> None:
        """Shows the preview where there is room for it."""
        self.preview.fit()
        self._about()

    def on_session_previewed(self, message: SessionPreviewed) -> None:
        """A preview was read."""
        self.preview.take(message, self._highlighted())

    def on_row_selected(self, message: RowSelected) -> None:
        """Opens a session: enter, or a second click."""
        self.context.open_session(message.key)

    def _highlighted(self) -> SessionRow | None:
        found = self._rows.get(self._table.key or "")
        return found.row if found is not None else None

    def steering_target(self) -> SteeringTarget | None:
        """The highlighted session."""
        row, context = self._highlighted(), self.context
        if row is None:
            return None
        session = context.session
        if session is not None and str(session.folder) == row.folder and context.state.known:
            return super().steering_target()  # read more often than the list
        return SteeringTarget.of_row(row)

    # -- keys ----------------------------------------------------------------------------------

    def why_disabled(self, action: str) -> str:
        """Why the highlighted session does not allow an action."""
        if reason := super().why_disabled(action):
            return reason
        row = self._highlighted()
        if row is None:
            needs_row = action in ("resume", "fork", "delete", "mark_session", "overlay")
            return NO_SESSION if needs_row else ""
        reason = ""
        match action:
            case "resume" | "fork" if row.state == "unreadable":
                verify = self.context.state.command("verify", row.name)
                reason = f"'{row.name}' cannot be read: {verify} says what is wrong"
            case "overlay" if not set(self._marked) - {row.name}:
                reason = "no other session is marked: m marks one, M by a pattern"
            case "resume" if row.pid:
                reason = f"'{row.name}' is running: enter opens it"
            case "fork" if not row.checkpoints:
                reason = f"'{row.name}' has no checkpoint to fork from"
            case "delete" if row.pid:
                reason = f"'{row.name}' is running: stop it first (S)"
        return reason

    def action_sort(self) -> None:
        """Sorts by the next column; after the last one, live and newest sessions come first."""
        titles = ["", *self._columns.orders()]
        now = self._table.sorted_by
        at = titles.index(now) if now in titles else 0
        self._sort_by(titles[(at + 1) % len(titles)])

    def action_reverse(self) -> None:
        """Reverses the order of the column that the list is sorted by."""
        self._table.descending = not self._table.descending
        self._show_rows()

    def action_mark_session(self) -> None:
        """Marks the highlighted session, or removes its mark; goes to the next one."""
        name = self._table.key
        if name is None:
            return
        if name in self._marked:
            self._marked.remove(name)
        else:
            self._marked.append(name)
        self._show_marks()
        self._table.action_move(1)

    def action_mark_matching(self) -> None:
        """Asks for a pattern, and marks the sessions whose names match it; none without a match."""
        from rlhf_tui.dialogs.sessions import (  # noqa: PLC0415 - keeps start-up short
            MarkSessionsDialog,
            matching,
        )

        names = list(self._rows)

        def take(text: str | None) -> None:
            if text is not None:
                self._marked = matching(text, names) or []
                self._show_marks()

        self.app.push_screen(MarkSessionsDialog(names), take)

    def _show_marks(self) -> None:
        self._show_rows()
        self._about()
        self.refresh_keys()

    def action_overlay(self) -> None:
        """Opens the highlighted session with the curves of all marked ones over its own."""
        name, marked = self._table.key, list(self._marked)
        if name is not None and self.context.open_session(name):
            self.context.view.wanted = [other for other in marked if other != name]

    def action_metric(self) -> None:
        """Asks for the metric whose last value and newest values are listed."""
        from rlhf_tui.dialogs.metrics import metric_option  # noqa: PLC0415 - keeps start-up short
        from rlhf_tui.dialogs.picker import PickerDialog  # noqa: PLC0415 - keeps start-up short

        names = dict.fromkeys(n for s in self._rows.values() for n in s.metrics)
        title = title_of(self._columns.metric)
        shown = self._columns.metric
        options = [metric_option(n, "shown" if n == shown else "") for n in names]

        def take(name: str | None) -> None:
            if name:
                self._columns.metric = self.context.preferences.listed_metric = name
                if self._table.sorted_by == title:
                    self._table.sorted_by = title_of(name)
                self.context.save_preferences()
                self.read_sessions(replaces=True)

        self.app.push_screen(PickerDialog("List the values of", options), take)

    def action_settings(self) -> None:
        """Shows the settings that differ instead of the usual columns, and back."""
        self._columns.with_settings = not self._columns.with_settings
        self._table.sorted_by = ""
        self._reading_settings = self._columns.with_settings
        self._about()
        self.read_sessions(replaces=True)

    def action_new(self) -> None:
        """Asks, then starts the demo."""
        root = self.context.root
        name = free_name(root, "demo")
        rows: list[Row] = [
            [("Trains a small model for a few minutes; nothing is downloaded.", "")],
            [(f"New session: {short_path(root / name)}", "dim")],
        ]
        choices = [Choice("c", "Cancel", "cancel"), Choice("s", "Start", "start")]

        def chosen(result: str | None) -> None:
            if result == "start":
                self.context.engines.start(["demo", "--name", name], name)

        self.app.push_screen(ChoiceDialog("Start a demo run?", rows, choices), chosen)

    def action_new_from_file(self) -> None:
        """Asks for a configuration file, then starts a run from it."""
        self.context.engines.ask_new()

    def action_resume(self) -> None:
        """Asks for overrides, then resumes the session from its last checkpoint."""
        if (row := self._highlighted()) is not None:
            self.context.engines.ask_resume(row.name)

    def action_fork(self) -> None:
        """Forks the session from its last checkpoint."""
        if (row := self._highlighted()) is not None:
            self.context.engines.ask_fork(row.name, max(row.checkpoints))

    def action_delete(self) -> None:
        """Asks, then deletes the session."""
        from rlhf_tui.dialogs.sessions import DeleteSessionDialog  # noqa: PLC0415 - start-up

        if (row := self._highlighted()) is None:
            return
        name = row.name

        def chosen(result: str | None) -> None:
            if result == "delete":
                self.context.forget_session(name)
                self.context.engines.run_command(["rm", name, "-y"], f"'{name}' is deleted")

        self.app.push_screen(DeleteSessionDialog(row, short_path(row.folder)), chosen)
