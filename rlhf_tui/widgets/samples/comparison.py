"""An answer held against another one to its prompt, with the words that only one of them has."""

import functools
from dataclasses import dataclass

from engine.journal.rows import ProbeResponse, SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Piece, Row, justified, row_width
from rlhf_tui.widgets.samples.diff import MOST, Own, marked_lines, own_words
from rlhf_tui.widgets.samples.judgement import judgement_rows
from rlhf_tui.widgets.wrap import wrap

SIDE_BY_SIDE = 100
"""Cells from which on two answers stand beside one another."""
GAP = " │ "


@dataclass(frozen=True)
class ComparisonTarget:
    """What an answer is held against."""

    kind: str
    """`earlier` or `reference`."""
    title: str
    """Which one it is."""
    mine: str
    """The answer's own words."""
    row: SampleRow | ProbeResponse | None = None
    """The other response; None: there is none."""
    lack: str = ""
    """Why there is none, and what can be done about it."""
    better: str = ""
    """`this` or `other`, where somebody said so."""
    who: str = ""

    @functools.cached_property
    def own(self) -> Own:
        """The words that only one of them has."""
        return own_words(self.mine, self.row.response if self.row else "")


def comparison(sample: SampleRow, beside: ComparisonTarget, width: int) -> list[Row]:
    """All lines: both answers, the keys, and the prompt, which they have in common, last."""
    wide = width >= SIDE_BY_SIDE and beside.row is not None
    half = (width - len(GAP)) // 2 if wide else width
    left = _head(f"THIS, step {sample.step} #{sample.index}", sample, beside, "this", half)
    if beside.row is None:
        rows = [*left, *([(line, "")] for line in wrap(sample.response, half)), []]
        rows += [
            [(beside.title, "strong")],
            *([(line, "warn")] for line in wrap(beside.lack, width)),
        ]
    else:
        right = _head(beside.title, beside.row, beside, "other", half)
        if wide:
            longer = max(len(left), len(right))
            left += [[]] * (longer - len(left))
            right += [[]] * (longer - len(right))
        left += marked_lines(sample.response, beside.own.mine, "mine", half)
        right += marked_lines(beside.row.response, beside.own.theirs, "theirs", half)
        rows = _abreast(left, right, half) if wide else [*left, [], *right]
    rows += [[], *_legend(beside, width), []]
    prompt = [[(line, "dim")] for line in wrap(sample.prompt, width)]
    return [*rows, [("PROMPT", "dim")], *prompt]


def _head(
    title: str, row: SampleRow | ProbeResponse, beside: ComparisonTarget, which: str, width: int
) -> list[Row]:
    numbers = [f"score {fmt.number(row.score, 2)}", f"{row.length} tokens"]
    if (which, beside.kind) != ("other", "reference"):  # which has none to itself
        numbers.insert(1, f"KL {fmt.number(row.kl, 1)}")
    rows: list[Row] = [justified([(title, "strong")], [("  ".join(numbers), "dim")], width)]
    if beside.better == which:
        rows.append([("✓ better", "good"), (f"   {beside.who}", "dim")])
    return rows + (judgement_rows(row.judgement, width) if isinstance(row, SampleRow) else [])


def _abreast(left: list[Row], right: list[Row], half: int) -> list[Row]:
    rows: list[Row] = []
    for i in range(max(len(left), len(right))):
        one = left[i] if i < len(left) else []
        other = right[i] if i < len(right) else []
        rows.append([*one, (" " * (half - row_width(one)), ""), (GAP, "dim"), *other])
    return rows


def _legend(beside: ComparisonTarget, width: int) -> list[Row]:
    cycle: list[Piece] = [("d ", "key"), ("next", "dim")]
    if beside.row is None:
        return [cycle]
    keys: list[Piece] = [("y ", "key"), ("this is better  ", "dim")]
    keys += [("o ", "key"), ("other is better  ", "dim")]
    if beside.kind == "earlier":
        keys += [("← → ", "key"), ("choose  ", "dim")]
    keys += cycle
    words: list[Piece] = [
        ("only in this", "mine"), ("  ", ""), ("only in other", "theirs"),
        (f"  {beside.own.common} words in common", "dim"),
    ]  # fmt: skip
    rows: list[Row] = [keys, words]
    if row_width(keys) + row_width(words) + 3 <= width:
        rows = [[*keys, ("   ", ""), *words]]
    if beside.own.cut:
        rows.append([(f"only the first {MOST:,} words are compared", "warn")])
    return rows
