"""The table of samples: its columns, and the cells of a row."""

from collections.abc import Iterable

from engine.journal.rows import SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Piece
from rlhf_tui.widgets.samples.common_affixes import CommonAffixes
from rlhf_tui.widgets.samples.judgement import mark
from rlhf_tui.widgets.samples.turns import on_one_line
from rlhf_tui.widgets.table import Column, Table

TURNS = "turns"


class SamplesTable(Table):
    """The list of samples."""

    with_scrollbar = True

    def show_turns(self, rows: Iterable[SampleRow]) -> None:
        """Shows the column of turns if one of the rows had an environment."""
        shown = any(row.replies is not None for row in rows)
        next(c for c in self.columns if c.title == TURNS).has_values = shown


def samples_table() -> SamplesTable:
    """The empty table."""
    table = SamplesTable(
        [
            Column("step", 6, right=True),
            Column("#", 3, right=True),
            Column("score", 7, right=True),
            Column("KL", 7, right=True),
            Column("len", 4, right=True),
            Column(TURNS, 5, right=True),
            Column("", 1),
            Column("", 2),
            Column("prompt", 10, flexible=True, least=90),
            Column("response", 10, flexible=True, share=2),
        ],
        id="samples",
    )
    table.show_turns(())
    return table


def cells_of(row: SampleRow, affixes: CommonAffixes) -> list[Piece]:
    """The cells of a row, in the order of the columns; `affixes` of the list's prompts."""
    score = row.score
    return [
        (str(row.step), "dim"),
        (str(row.index), "dim"),
        (fmt.number(score, 2), "strong"),
        (_kl(row.kl), ""),
        (str(row.length), ""),
        ("" if row.replies is None else str(len(row.replies) + 1), ""),
        ("" if row.ended else "✂", "warn"),
        mark(row),
        (affixes.removed_from(row.prompt), "dim"),
        ("".join(text for text, _ in on_one_line(row.response, row.replies)), ""),
    ]


def _kl(value: float | None) -> str:
    """The KL with one decimal, or more near 0, where it is in the first steps."""
    return fmt.number(value, 2 if abs(value or 0) < 0.1 else 1)
