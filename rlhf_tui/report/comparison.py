"""The other run of a report that puts two side by side."""

import msgspec
from msgspec import Struct

from engine.config import file as config_file
from engine.journal.judgements.agreement import read_agreement
from engine.journal.reader import JournalReader
from engine.session.folder import SessionFolder
from rlhf_tui.format import value_text
from rlhf_tui.report.curves import Curve, read_curves
from rlhf_tui.report.headlines import Headline, read_headlines, read_held_out
from rlhf_tui.report.settings import Setting
from rlhf_tui.state.runs.differences import LAST_STEP_SUFFIX, settings_after


class Comparison(Struct, frozen=True):
    """The run that a report compares with."""

    name: str
    state: str
    step: int
    headlines: list[Headline]
    held_out: list[Headline]
    settings: list[Setting]
    """The keys that differ; `default` is the value of the other run."""
    curves: dict[str, Curve]
    """The other run's curves, by metric."""

    def overlaid(self, curves: list[Curve]) -> list[Curve]:
        """Adds the other run's curves to those of a report."""
        return [
            msgspec.structs.replace(curve, other=other.points)
            if (other := self.curves.get(curve.name))
            else curve
            for curve in curves
        ]


def read_comparison(session: SessionFolder, other: SessionFolder) -> Comparison:
    """Reads the other run.

    Raises:
        RlhfError: its journal or a configuration cannot be read.
    """
    configs = [session.config(), other.config()]
    changed = config_file.changes(*configs)
    with JournalReader(session) as own, JournalReader(other) as reader:
        in_force = [each.settings_after_last_step() for each in (own, reader)]
        after = settings_after(configs, in_force)
        step = reader.last_step()
        return Comparison(
            name=other.name,
            state=reader.state(),
            step=step,
            headlines=read_headlines(reader, step),
            held_out=read_held_out(reader, step),
            settings=[
                *(Setting(key, mine, theirs) for key, (mine, theirs) in changed.items()),
                *(
                    Setting(f"{key}{LAST_STEP_SUFFIX}", *map(value_text, last))
                    for key, last in after.items()
                ),
            ],
            curves={curve.name: curve for curve in read_curves(reader, read_agreement(reader))},
        )
