"""The probes of a run: a list, from which each is shown again."""

from collections.abc import Sequence

from engine.journal.rows import CommandRow, ProbeResult
from rlhf_tui import format as fmt
from rlhf_tui.dialogs.base import is_on_top
from rlhf_tui.dialogs.picker import Option, PickerDialog
from rlhf_tui.dialogs.text import ProbeDialog


class ProbePicker(PickerDialog):
    """Lists probes, the newest first. Enter shows one over the list."""

    def __init__(self, session: str, probes: Sequence[CommandRow]) -> None:
        """For a run.

        Args:
            session: its name.
            probes: commands of type probe that have a result, the oldest first.
        """
        self._session = session
        self._probes = {probe.id: probe for probe in probes}
        options = [
            Option(
                p.id, prompt_of(p), f"step {p.applied_step}", f"{p.who.split(' ')[0]}, {_when(p)}"
            )
            for p in reversed(probes)
        ]
        super().__init__(f"Probes of {session}", options)

    def close_with(self, result: str | None) -> None:
        """Shows the selected probe; closes if none was selected."""
        if result is None:
            super().close_with(None)
        if result is None or not is_on_top(self):  # enter twice shows a probe once
            return
        probe = self._probes[result]
        found = ProbeResult.of(probe.result)
        self.app.push_screen(
            ProbeDialog(self._session, prompt_of(probe), found, probe.applied_step)
        )


def prompt_of(probe: CommandRow) -> str:
    """The prompt of a probe."""
    return str(probe.args.get("text", ""))


def _when(probe: CommandRow) -> str:
    """Month, day, hour and minute."""
    return fmt.clock(probe.ended if probe.ended is not None else probe.queued)[5:16]
