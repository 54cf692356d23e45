"""Dialogs about the sessions of a list."""

import re
from pathlib import Path

from textual import work

from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import Choice, ChoiceDialog, InputDialog
from rlhf_tui.state.runs.session_row import SessionRow
from rlhf_tui.widgets.lines import Row


class DeleteSessionDialog(ChoiceDialog):
    """Asks whether to delete a session; the result is then `delete`."""

    def __init__(self, row: SessionRow, folder: str) -> None:
        """For a session that is listed; `folder`: as it is shown."""
        checkpoints = fmt.plural(len(row.checkpoints), "checkpoint")
        self._session = SessionFolder(Path(row.folder))
        self._text: list[Row] = [
            [("Its journal, its samples and ", ""), (checkpoints, "strong"),
             (" are deleted. This cannot be undone.", "")],
            [(folder, "dim")],
        ]  # fmt: skip
        choices = [Choice("c", "Cancel", "cancel"), Choice("d", "Delete", "delete", danger=True)]
        super().__init__(f"Delete session {row.name}?", [*self._text, []], choices)

    def on_mount(self) -> None:
        """Reads what is freed."""
        self.show_freed()

    @work(thread=True)
    def show_freed(self) -> None:
        """Adds what deleting the session frees; the dialog may be closed meanwhile."""
        try:
            freed: Row = [(fmt.freed(self._session.disk_usage()), "dim")]
        except OSError:  # deleting it says so
            return
        self.call_later(self.say, [*self._text, freed])


class MarkSessionsDialog(InputDialog):
    """Asks for a pattern of names, see :func:`matching`."""

    def __init__(self, names: list[str]) -> None:
        """`names`: of all sessions."""

        def check(text: str) -> tuple[bool, str]:
            found = matching(text, names)
            if found is None:
                return False, "not a regular expression"
            listed = f": {' '.join(found)}" if found else ""
            return True, f"marks {fmt.plural(len(found), 'session')}{listed}"

        rows: list[Row] = [[("A regular expression, such as ", "dim"), ("lr-.*-seed[12]", "key"),
                            ("; empty: no marks", "dim")]]  # fmt: skip
        title = "Mark the sessions whose names match"
        super().__init__(title, rows, "", check, verb="mark")


def matching(pattern: str, names: list[str]) -> list[str] | None:
    """The names that a regular expression matches: [] if it is empty, None if it is invalid."""
    try:
        return [name for name in names if pattern and re.search(pattern, name)]
    except re.error:
        return None
