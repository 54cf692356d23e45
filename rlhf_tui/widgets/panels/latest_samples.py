"""The newest responses."""

from collections.abc import Sequence

from rich.cells import cell_len

from engine.journal.rows import SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Row, row_width
from rlhf_tui.widgets.panels.panel import Panel, heading
from rlhf_tui.widgets.samples.common_affixes import CommonAffixes, common_affixes
from rlhf_tui.widgets.samples.turns import on_one_line


class LatestSamplesPanel(Panel):
    """The responses of the newest step, in the order of their prompts, as many as fit."""

    def rows(self, width: int, height: int) -> list[Row]:
        """Score, KL and length, then the end of the prompt and the response."""
        keys = "3 read" if width >= 40 else "3"
        first = not self.state.head.step
        none = "none yet: they appear with the first step" if first else "none read yet"
        return newest_responses(self.state.samples, width, height, keys, none=none)


def newest_responses(
    samples: Sequence[SampleRow], width: int, height: int, keys: str = "", none: str = "none yet"
) -> list[Row]:
    """The lines of the newest step's responses, or `none`, below a heading with `keys`."""
    if not samples:
        return [heading("Newest responses", keys, width), [(f" {none}", "dim")]]
    step = samples[-1].step
    newest = [s for s in samples if s.step == step]
    title = f"Newest responses, step {step}"
    versions = [s.weights_version for s in newest if s.weights_version is not None]
    if versions and min(versions) < step - 1:  # generated ahead
        title += f", weights of step {min(versions)}"
    return [heading(title, keys, width), *response_lines(newest, width, height - 1)]


def response_lines(samples: Sequence[SampleRow], width: int, most: int) -> list[Row]:
    """At most so many lines, one for each response: its numbers, the end of the prompt, itself."""
    affixes = common_affixes(sample.prompt for sample in samples)
    return [_response(sample, width, affixes) for sample in samples[: max(most, 0)]]


def _response(sample: SampleRow, width: int, affixes: CommonAffixes) -> Row:
    wide = width >= 60
    before: Row = [
        (f" {fmt.number(sample.score, 2):>7}", "strong"),
        (f" {fmt.number(sample.kl, 1):>6}" if wide else "", "dim"),
        (f" {sample.length:>3}" if wide else "", "dim"),
        ("  " if sample.ended else " ✂", "warn"),
        (" ", ""),
    ]
    response = on_one_line(sample.response, sample.replies)
    # The prompt has a quarter of the width, or what a short response leaves.
    shown: Row = [(text[:width], style) for text, style in response]
    room = width - row_width([*before, ("│", "dim"), *shown])
    prompt = _end_of(one_line(affixes.removed_from(sample.prompt)), max(width // 4, 8, room))
    return [*before, (prompt, "dim"), ("│", "dim"), *response]


def _end_of(text: str, most: int) -> str:
    """The end of a text, in at most `most` cells."""
    if cell_len(text) <= most:
        return text
    text = text[1 - most :]
    while cell_len(text) >= most:  # some characters have two cells
        text = text[1:]
    return "…" + text
