"""What operators think of an answer: its mark in a table, and in words above the answer."""

from engine.journal.rows import Judgement, SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.wrap import wrap

LABEL_MARKS: dict[str, Piece] = {"good": ("+", "good"), "bad": ("-", "bad"), "hack": ("!", "warn")}
"""By label; the mark is also the key that sets it."""
NOTE = "✎"


def key_of(sample: SampleRow) -> tuple[int, int, int]:
    """Which answer it is: of the same step and place there is another one after a roll back."""
    return sample.attempt, sample.step, sample.index


def mark(sample: SampleRow) -> Piece:
    """Two cells at most: the label, and whether there is a note."""
    text, tone = LABEL_MARKS.get(sample.label or "", ("", "key"))
    return text + (NOTE if sample.note else ""), tone


def judgement_rows(judgement: Judgement | None, width: int) -> list[Row]:
    """Label, who and when, and the note; nothing where nobody has judged."""
    if judgement is None or not (judgement.label or judgement.note):
        return []
    label, note = judgement.label, judgement.note
    if label:
        mark_text, tone = LABEL_MARKS[label]
        first: Piece = (f"{mark_text} {label}", tone)
    else:
        first = (f"{NOTE} note", "key")
    rows: list[Row] = [[first, (f"   {judgement.who}, {fmt.clock(judgement.time)}", "dim")]]
    if note:
        lead = f"{NOTE} " if label else ""
        rows += [[(line, "key")] for line in wrap(f"{lead}{note}", width)]
    return rows
