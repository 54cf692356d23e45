"""The operators' judgement of a response: its mark in a table, and the lines above the response."""

from engine.journal.rows import Judgement, SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.wrap import wrap

LABEL_MARKS: dict[str, Piece] = {"good": ("+", "good"), "bad": ("-", "bad"), "hack": ("!", "warn")}
"""Mark by label. The mark is also the key that sets the label."""
NOTE = "✎"


def key_of(sample: SampleRow) -> tuple[int, int, int]:
    """The key of a response: after a roll back a step and index occur in several attempts."""
    return sample.attempt, sample.step, sample.index


def mark(sample: SampleRow) -> Piece:
    """The mark in a table, at most two cells: label and note."""
    text, tone = LABEL_MARKS.get(sample.label or "", ("", "key"))
    return text + (NOTE if sample.note else ""), tone


def judgement_rows(judgement: Judgement | None, width: int) -> list[Row]:
    """Label or note with who and when; no rows if the response is not judged."""
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
