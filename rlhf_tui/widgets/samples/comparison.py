"""A response compared with another one to the same prompt, with their differences marked."""

import functools

from msgspec import Struct

from engine.journal.rows import ProbeResponse, SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Row, flowed, justified, row_width
from rlhf_tui.widgets.samples.diff import MAX_WORDS, WordDiff, diff_words
from rlhf_tui.widgets.samples.judgement import judgement_rows
from rlhf_tui.widgets.samples.turns import (
    LEGEND,
    Replies,
    marked_response_rows,
    own_text,
    response_rows,
)
from rlhf_tui.widgets.wrap import wrap

SIDE_BY_SIDE = 100
"""Width in cells from which on two responses are side by side."""
GAP = " │ "


class ComparisonTarget(Struct, frozen=True, dict=True):
    """The other side of a comparison."""

    kind: str
    """`earlier` or `reference`."""
    title: str
    """The heading of the other response."""
    mine: SampleRow
    """The response that is compared."""
    row: SampleRow | ProbeResponse | None = None
    """The other response; None if there is none."""
    missing: str = ""
    """Why there is no other response, and which key helps."""
    better: str = ""
    """`this` or `other` if a preference was given."""
    who: str = ""
    """Who gave it."""

    @functools.cached_property
    def diff(self) -> WordDiff:
        """The policy's words that only one of the responses has."""
        theirs = own_text(self.row.response, replies_of(self.row)) if self.row else ""
        return diff_words(own_text(self.mine.response, self.mine.replies), theirs)


def replies_of(row: SampleRow | ProbeResponse | None) -> Replies:
    """The replies in a response."""
    return None if row is None else row.replies


def comparison(sample: SampleRow, target: ComparisonTarget, width: int) -> list[Row]:
    """All lines: both responses, the keys, and at the end their common prompt."""
    wide = width >= SIDE_BY_SIDE and target.row is not None
    half = (width - len(GAP)) // 2 if wide else width
    left = _head(f"THIS, step {sample.step} #{sample.index}", sample, target, "this", half)
    if target.row is None:
        rows = [*left, *response_rows(sample.response, sample.replies, half), []]
        rows += [
            [(target.title, "strong")],
            *([(line, "warn")] for line in wrap(target.missing, width)),
        ]
    else:
        right = _head(target.title, target.row, target, "other", half)
        if wide:
            height = max(len(left), len(right))
            left += [[]] * (height - len(left))
            right += [[]] * (height - len(right))
        other, diff = target.row, target.diff
        left += marked_response_rows(sample.response, sample.replies, diff.mine, "mine", half)
        right += marked_response_rows(
            other.response, replies_of(other), diff.theirs, "theirs", half
        )
        rows = _side_by_side(left, right, half) if wide else [*left, [], *right]
    rows += [[], *_legend(target, width), []]
    prompt = [[(line, "dim")] for line in wrap(sample.prompt, width)]
    return [*rows, [("PROMPT", "dim")], *prompt]


def _head(
    title: str, row: SampleRow | ProbeResponse, target: ComparisonTarget, which: str, width: int
) -> list[Row]:
    numbers = [f"score {fmt.number(row.score, 2)}", f"{row.length} tokens"]
    if (which, target.kind) != ("other", "reference"):  # the reference has no KL to itself
        numbers.insert(1, f"KL {fmt.number(row.kl, 1)}")
    if (replies := replies_of(row)) is not None:
        numbers.append(fmt.plural(len(replies) + 1, "turn"))
    heading: Row = [(title, "strong")]
    values: Row = [("  ".join(numbers), "dim")]
    one_line = row_width(heading) + row_width(values) < width
    rows = [justified(heading, values, width)] if one_line else [heading, values]
    if target.better == which:
        rows.append([("✓ better", "good"), (f"   {target.who}", "dim")])
    return rows + (judgement_rows(row.judgement, width) if isinstance(row, SampleRow) else [])


def _side_by_side(left: list[Row], right: list[Row], half: int) -> list[Row]:
    rows: list[Row] = []
    for i in range(max(len(left), len(right))):
        one = left[i] if i < len(left) else []
        other = right[i] if i < len(right) else []
        rows.append([*one, (" " * (half - row_width(one)), ""), (GAP, "dim"), *other])
    return rows


def _legend(target: ComparisonTarget, width: int) -> list[Row]:
    """The keys that the footer has no room for, and what the styles mean."""
    cycle: Row = [("d ", "key"), ("next", "dim")]
    if target.row is None:
        return [cycle]
    oldest: Row = [("L ", "key"), ("first", "dim")]
    keys = [oldest, cycle] if target.kind == "earlier" else [cycle]
    legend: list[Row] = [
        [("only in this", "mine")],
        [("only in other", "theirs")],
        [(f"{fmt.plural(target.diff.common, 'word')} in common", "dim")],
    ]
    if target.mine.replies or replies_of(target.row):
        legend.append([LEGEND])
    rows, legends = flowed(keys, width, "  "), flowed(legend, width, "  ")
    if len(legends) == 1 and row_width(rows[0]) + row_width(legends[0]) + 3 <= width:
        rows = [[*rows[0], ("   ", ""), *legends[0]]]
    else:
        rows += legends
    if target.diff.cut:
        rows.append([(f"only the first {MAX_WORDS:,} words are compared", "warn")])
    return rows
