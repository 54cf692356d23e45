"""What operators think of an answer: its mark in a table, and in words above the answer."""

from typing import Any

from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.wrap import wrap

LABEL_MARKS: dict[str, Piece] = {"good": ("+", "good"), "bad": ("-", "bad"), "hack": ("!", "warn")}
"""By label; the mark is also the key that sets it."""
NOTE = "✎"


def key_of(sample: dict[str, Any]) -> tuple[int, int, int]:
    """Which answer it is: of the same step and place there is another one after a roll back."""
    return sample["attempt"], sample["step"], sample["index"]


def mark(sample: dict[str, Any]) -> Piece:
    """Two cells at most: the label, and whether there is a note."""
    text, tone = LABEL_MARKS.get(sample.get("label") or "", ("", "key"))
    return text + (NOTE if sample.get("note") else ""), tone


def judgement_rows(sample: dict[str, Any], width: int) -> list[Row]:
    """Label, who and when, and the note; nothing where nobody has judged."""
    label, note = sample.get("label"), sample.get("note")
    if not label and not note:
        return []
    said = (
        [(f"{LABEL_MARKS[label][0]} {label}", LABEL_MARKS[label][1])]
        if label
        else [(f"{NOTE} note", "key")]
    )
    rows: list[Row] = [[*said, (f"   {sample['who']}, {fmt.clock(sample['time'])}", "dim")]]
    if note:
        lead = f"{NOTE} " if label else ""
        rows += [[(line, "key")] for line in wrap(f"{lead}{note}", width)]
    return rows
