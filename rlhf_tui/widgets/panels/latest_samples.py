"""The newest responses."""

from collections.abc import Sequence

from engine.journal.rows import SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Row
from rlhf_tui.widgets.panels.panel import Panel, heading


class LatestSamplesPanel(Panel):
    """The responses of the newest step, in the order of their prompts, as many as fit."""

    def rows(self, width: int, height: int) -> list[Row]:
        """Score, KL and length, then the end of the prompt and the response."""
        return newest_responses(self.state.samples, width, height, "3 read" if width >= 40 else "3")


def newest_responses(
    samples: Sequence[SampleRow], width: int, height: int, keys: str = ""
) -> list[Row]:
    """The lines of the newest step's responses, below a heading with `keys`."""
    if not samples:
        none = " none yet: they appear with the first step"
        return [heading("Newest responses", keys, width), [(none, "dim")]]
    step = samples[-1].step
    rows: list[Row] = [heading(f"Newest responses, step {step}", keys, width)]
    for s in [s for s in samples if s.step == step][: height - 1]:
        rows.append(
            [
                (f" {fmt.number(s.score, 2):>7}", "strong"),
                (f" {fmt.number(s.kl, 1):>6}" if width >= 60 else "", "dim"),
                (f" {s.length:>3}" if width >= 60 else "", "dim"),
                ("  " if s.ended else " ✂", "warn"),
                (" ", ""),
                (s.prompt.strip()[-max(width // 4, 8) :], "dim"),
                ("│", "dim"),
                (s.response.strip(), ""),
            ]
        )
    return rows
