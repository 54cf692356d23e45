"""Dialogs that choose metrics."""

from engine.journal.reader import JournalReader
from engine.metrics import describe, title_of
from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.picker import Option, PickerDialog
from rlhf_tui.state.session_state import SessionState


class ChartPicker(PickerDialog):
    """Chooses which metrics have a chart, alone or together."""

    def __init__(self, state: SessionState, groups: list[list[str]]) -> None:
        """For the open session; `groups`: the metrics of each chart that is shown."""
        curves, shown = state.curves, [name for group in groups for name in group]
        names = list(dict.fromkeys([*shown, *curves.drawable]))
        options = [metric_option(name, _number(name, curves.shape(name).last)) for name in names]
        super().__init__("Choose charts", options, groups)
        self.unread = [name for name in names if not curves.shape(name)]
        """Metrics whose newest values :meth:`read_newest` adds, because no chart has read them."""

    def read_newest(self, session: SessionFolder) -> None:
        """Adds the newest values of the other metrics. Call it in a thread. Raises JournalError."""
        with JournalReader(session) as reader:
            newest = {name: reader.metrics.newest_value(name) for name in self.unread}
        values = {name: _number(name, found[1]) for name, found in newest.items() if found}
        self.call_later(self.show_values, values)


def metric_option(name: str, value: str) -> Option:
    """The line of a metric, with its title if it has one."""
    title = title_of(name)
    return Option(name, name, value, title if title != name else "")


def _number(name: str, value: float | None) -> str:
    return "" if value is None else fmt.number(value, describe(name).digits)
