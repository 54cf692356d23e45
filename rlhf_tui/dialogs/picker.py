"""A dialog with a list, to select one option or several."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import msgspec
from msgspec import Struct
from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from rlhf_tui.dialogs.base import Dialog, MessageLine
from rlhf_tui.state.messages import RowSelected
from rlhf_tui.widgets.lines import Piece
from rlhf_tui.widgets.table import Column, Table

if TYPE_CHECKING:  # Textual imports each widget when it is first used: start-up stays short
    from textual.widgets import Input

FRAME_ROWS = 8
"""Rows of the terminal that a picker does not use for its list."""
KEYS = "enter select · esc cancel"
GROUP_SEPARATOR = " + "
"""Separates the keys of a group."""
MIN_SIMILARITY = 0.6
"""Similarity, from 0 to 1, from which a name is shown if nothing fits what is typed."""
MAX_SIMILAR = 5
"""Names that are then shown at most."""


class Option(Struct, frozen=True):
    """A line of the list."""

    key: str
    label: str
    value: str = ""
    detail: str = ""
    words: str = ""
    """Other names, by which it is found; not shown."""


class PickerDialog(Dialog[str]):
    """A list that typing filters, by words or a regular expression.

    If nothing fits, the list shows similar names. Enter selects the line, or with `marked` all
    marked lines.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "move(1)", "down", show=False, priority=True),
        Binding("up", "move(-1)", "up", show=False, priority=True),
        Binding("tab", "mark", "mark", show=False, priority=True),
        Binding(
            "shift+tab", "join", "mark together with the previous one", show=False, priority=True
        ),
        Binding("ctrl+a", "mark_all", "mark all that are shown", show=False, priority=True),
    ]

    def __init__(
        self,
        title: str,
        options: list[Option],
        marked: list[list[str]] | None = None,
        *,
        joins: bool = True,
        assigns: bool = False,
    ) -> None:
        """With `marked`, several options can be selected, alone or in groups.

        The result is then a line for each group, its keys joined by :data:`GROUP_SEPARATOR`.
        Without `joins` there are no groups, and none need be selected: the result is then empty.

        With `assigns`, a value may be typed after the name, as `name=value`. The result then has
        the same form.
        """
        super().__init__(title)
        self.options = options
        self.several = marked is not None
        self.marked = [list(group) for group in marked or []]
        self.joins = joins
        self.assigns = assigns
        self._had_marks = bool(marked)
        self._query = ""
        self._shown: list[Option] = []
        """The options that fit what is typed."""

    def body(self) -> ComposeResult:
        """The search field, the list, the keys."""
        from rlhf_tui.widgets.text_input import TextInput  # noqa: PLC0415 - keeps the start quick

        yield TextInput(placeholder="type to search", id="search", compact=True)
        detail = Column("", 22, hidden_below=62)
        detail.has_values = any(option.detail for option in self.options)
        label = Column("", 22, flexible=True, both_ends=True)
        table = Table([Column("", 4), label, Column("", 10, right=True), detail], id="options")
        table.with_scrollbar = True
        table.styles.height = self._height()
        yield table
        yield MessageLine([[(self._keys(), "dim")]], id="keys")

    def _keys(self) -> str:
        if not self.several:
            return KEYS
        more = "shift+tab overlay on previous" if self.joins else "ctrl+a mark all shown"
        return f"tab mark · {more} · {KEYS}"

    def _height(self) -> int:
        return min(len(self.options), max(self.app.size.height - FRAME_ROWS, 1))

    def on_resize(self) -> None:
        """Keeps the dialog within the terminal, so that every line can be reached."""
        for table in self.query(Table):
            table.styles.height = self._height()

    def on_mount(self) -> None:
        """Fills the list and gives the focus to the search field."""
        self.set_focus(self.query_one("#search"))
        self._fill()

    def on_input_changed(self, event: "Input.Changed") -> None:
        """Filters the list by what is typed; the cursor goes to the line that fits best."""
        before, self._query = self._searched, event.value
        self._fill(first=self._searched != before)

    def show_values(self, values: Mapping[str, str]) -> None:
        """Sets the values of options by their keys, such as those that are read meanwhile."""
        self.options = [
            msgspec.structs.replace(option, value=values.get(option.key, option.value))
            for option in self.options
        ]
        if self.is_mounted:
            self._fill()

    @property
    def _searched(self) -> str:
        """What is typed, without a value."""
        return self._query.partition("=")[0].strip() if self.assigns else self._query

    def _fill(self, *, first: bool = False) -> None:
        """Shows the options that fit what is typed; `first` selects the first one."""
        query = self._searched
        shown = fitting(query, self.options)
        similar = [] if shown else similar_to(query, self.options)
        self._shown = shown = shown or similar
        rows: list[tuple[str, list[Piece]]] = []
        for option in shown:
            mark = self._mark_of(option.key) if self.several else ""
            rows.append(
                (
                    option.key,
                    [
                        (mark, "good"),
                        (option.label, ""),
                        (option.value, "strong"),
                        (option.detail, "dim"),
                    ],
                )
            )
        key = rows[0][0] if rows and first else None
        self.query_one(Table).set_rows(rows, empty=[[(" no match", "dim")]], key=key)
        self.query_one("#keys", MessageLine).say(
            [[("no match; these names are similar", "warn"), (f" · {KEYS}", "dim")]]
            if similar
            else [[(self._keys(), "dim")]]
        )

    def _mark_of(self, key: str) -> str:
        """The number of the group: with a tick for its first key, with a plus for the others."""
        for i, group in enumerate(self.marked, start=1):
            if key in group:
                return f"{i:>2} {'✓' if group[0] == key else '+'}"
        return "  ·"

    def action_move(self, lines: int) -> None:
        """Moves in the list while the search field has the focus."""
        self.query_one(Table).action_move(lines)

    def action_mark(self) -> None:
        """Marks the line, or removes its mark."""
        self._toggle(join=False)

    def action_join(self) -> None:
        """Adds the line to the group that was marked last."""
        self._toggle(join=True)

    def action_mark_all(self) -> None:
        """Marks all lines that are shown; removes their marks if all of them have one."""
        if not self.several:
            return
        keys = [option.key for option in self._shown]
        marked = {key for group in self.marked for key in group}
        if marked.issuperset(keys):
            without = [[k for k in group if k not in keys] for group in self.marked]
            self.marked = [group for group in without if group]
        else:
            self.marked += [[key] for key in keys if key not in marked]
        self._fill()

    def _toggle(self, *, join: bool) -> None:
        key = self.query_one(Table).key
        if not self.several or key is None:
            return
        if any(key in group for group in self.marked):
            without = [[k for k in group if k != key] for group in self.marked]
            self.marked = [group for group in without if group]
        elif join and self.joins and self.marked:
            self.marked[-1].append(key)
        else:
            self.marked.append([key])
        self._fill()

    def on_input_submitted(self) -> None:
        """Selects the line of the cursor: enter in the search field."""
        self._select(self.query_one(Table).key)

    def on_row_selected(self, message: RowSelected) -> None:
        """Selects a line: enter or a click in the list."""
        message.stop()
        self._select(message.key)

    def _select(self, key: str | None) -> None:
        if self.several:
            none_marked = [] if not self.joins and self._had_marks else [[key]] if key else []
            groups = self.marked or none_marked
            self.close_with("\n".join(GROUP_SEPARATOR.join(group) for group in groups))
        elif key is not None:
            _, sign, value = self._query.partition("=")
            self.close_with(f"{key}={value.strip()}" if self.assigns and sign else key)


def fitting(query: str, options: Sequence[Option]) -> list[Option]:
    """The options that fit what is typed; first those whose own name fits."""
    fits = [o for o in options if matches(query, o.key, o.label, o.detail, o.words)]
    return sorted(fits, key=lambda o: not matches(query, o.key, o.label))


def similar_to(query: str, options: Sequence[Option]) -> list[Option]:
    """The options with a similar name, or a name with a similar part; the most similar first."""
    found = []
    for option in options:
        names = [option.key, *option.words.split(), *re.split(r"[\W_]+", option.key)]
        matcher = difflib.SequenceMatcher(b=query.lower())
        similarity = 0.0
        for name in names:
            matcher.set_seq1(name.lower())
            similarity = max(similarity, matcher.ratio())
        if similarity >= MIN_SIMILARITY:
            found.append((similarity, option))
    found.sort(key=lambda pair: -pair[0])
    return [option for _, option in found[:MAX_SIMILAR]]


def matches(query: str, *texts: str) -> bool:
    """Whether texts have all words of a query, or one matches it as a regular expression."""
    together = " ".join(texts).lower()
    if all(word in together for word in query.lower().split()):
        return True
    try:
        return any(re.search(query, text, re.IGNORECASE) for text in texts)
    except re.error:
        return False
