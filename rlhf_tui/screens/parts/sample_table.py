"""The table of samples: its columns, and the cells of a row."""

from collections.abc import Iterable

from engine.journal.judgements.labels import Key
from engine.journal.rows import SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.screens.parts.sample_list import ORDER_TITLES, SampleList
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.samples.common_affixes import CommonAffixes, common_affixes
from rlhf_tui.widgets.samples.judgement import key_of, mark
from rlhf_tui.widgets.samples.turns import on_one_line
from rlhf_tui.widgets.table import Column, Table

TURNS_COLUMN = "turns"


class SamplesTable(Table):
    """The list of samples."""

    with_scrollbar = True

    def __init__(self) -> None:
        super().__init__(
            [
                Column("step", 6, right=True),
                Column("#", 3, right=True),
                Column("score", 7, right=True),
                Column("KL", 7, right=True),
                Column("len", 4, right=True),
                Column(TURNS_COLUMN, 5, right=True),
                Column("", 1),
                Column("", 2),
                Column("prompt", 10, flexible=True, hidden_below=90),
                Column("response", 10, flexible=True, share=2),
            ],
            id="samples",
        )
        self._affixes = CommonAffixes()
        self._show_turns(())

    def show_list(self, samples: SampleList, empty: list[Row], select: Key | None) -> None:
        """Shows a list.

        Args:
            samples: the list.
            empty: the text in place of rows.
            select: the row to select; None: the selected one.
        """
        query, rows = samples.query, samples.rows
        self.sorted_by = ORDER_TITLES[query.order]
        self.descending = query.descending
        self.matching = query.text
        self._affixes = common_affixes(row.prompt for row in rows.values())
        self._show_turns(rows.values())
        cells = [(key, cells_of(row, self._affixes)) for key, row in rows.items()]
        self.set_rows(cells, empty, key=select, lost=0)

    def show_row(self, row: SampleRow) -> None:
        """Shows a row of the list with another judgement."""
        self.set_cells(key_of(row), cells_of(row, self._affixes))

    def _show_turns(self, rows: Iterable[SampleRow]) -> None:
        """Shows the column of turns if one of the rows had an environment."""
        shown = any(row.replies is not None for row in rows)
        next(c for c in self.columns if c.title == TURNS_COLUMN).has_values = shown


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
