"""The prompts of one data set, in an Arrow table, in memory or in a file.

A table in a file is memory-mapped: parts that are not used take no memory, and the ranks of a
machine share the others.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.train.data.prompts import Prompt

if TYPE_CHECKING:
    import datasets

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)
"""Columns: the token ids (null for a text that is certainly too long, and not tokenised), the text
that they encode, and the chat messages (null for plain text)."""
BATCH_ROWS = 4096
"""Prompts in a record batch. Reading a prompt reads its batch; one of long prompts has some
megabytes."""

Rows = Union[list[dict[str, Any]], "datasets.Dataset", None]
"""The rows that prompts come from: a list, a memory-mapped data set, or none."""


class PromptTable:
    """Prompts by index. Methods such as :meth:`select` leave some out without a copy."""

    def __init__(
        self, table: pa.Table, rows: Rows = None, chosen: NDArray[np.int64] | None = None
    ) -> None:
        """Wraps a table.

        Args:
            table: with :data:`SCHEMA`.
            rows: one for each prompt, in the same order. Without them, :attr:`Prompt.row` is empty.
            chosen: indices into the table, in ascending order. Default: all.
        """
        self._table = table
        self._rows = rows
        self._batches = table.to_batches()
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        self._chosen = np.arange(len(table), dtype=np.int64) if chosen is None else chosen

    @classmethod
    def read(cls, file: Path, rows: Rows = None) -> "PromptTable":
        """Memory-maps a file that :func:`write_batches` wrote. Raises OSError or ArrowException."""
        return cls(pa.ipc.open_file(pa.memory_map(str(file))).read_all(), rows)

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "PromptTable":
        """Returns a table in memory."""
        columns = [[getattr(p, name) for p in prompts] for name in SCHEMA.names]
        table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
        return cls(table, [p.row for p in prompts])

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def columns(self) -> list[str]:
        """The columns of the rows."""
        if isinstance(self._rows, list):
            return list(self._rows[0]) if self._rows else []
        return [] if self._rows is None else list(self._rows.column_names)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt, (n,); -1 for one that was too long to be tokenised."""
        counts = pc.fill_null(pc.list_value_length(self._table["ids"]), -1)
        return np.asarray(counts.to_numpy())[self._chosen].astype(np.int64)

    @property
    def texts(self) -> pa.ChunkedArray:
        """The texts of all prompts, in order."""
        return self._table["text"].filter(pa.array(self._mask()))

    def take(self, indices: Iterable[int]) -> list[Prompt]:
        """Returns the prompts with these indices."""
        places = [int(self._chosen[i]) for i in indices]
        rows = self._rows_at(places)
        return [
            Prompt(found["ids"], found["text"], row, found["messages"])
            for found, row in zip(map(self._at, places), rows, strict=True)
        ]

    def select(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> "PromptTable":
        """Selects prompts by ascending indices, or by a mask that is true for them."""
        return PromptTable(self._table, self._rows, self._chosen[chosen])

    def among(self, texts: pa.ChunkedArray) -> NDArray[np.bool_]:
        """Returns for each prompt whether its text is one of these; (n,) bool."""
        return np.asarray(pc.is_in(self._table["text"], value_set=texts).to_numpy())[self._chosen]

    def find(self, text: str) -> Prompt | None:
        """The first prompt with exactly this :attr:`Prompt.text`, or None."""
        found = np.flatnonzero(self.among(pa.chunked_array([pa.array([text], pa.string())])))
        return self.take(found[:1])[0] if len(found) else None

    def pack(self) -> bytes:
        """Serialises the prompts without their rows."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_table(self._table.filter(pa.array(self._mask())))
        return bytes(sink.getvalue())

    @classmethod
    def unpack(cls, data: bytes) -> "PromptTable":
        """Restores :meth:`pack`'s result."""
        return cls(pa.ipc.open_file(pa.BufferReader(data)).read_all())

    def _mask(self) -> NDArray[np.bool_]:
        mask = np.zeros(len(self._table), dtype=np.bool_)
        mask[self._chosen] = True
        return mask

    def _at(self, place: int) -> dict[str, Any]:
        """Returns one row. `Table.take` would copy whole columns of several batches."""
        number = int(np.searchsorted(self._ends, place, side="right"))
        batch = self._batches[number]
        (found,) = batch.slice(place - int(self._ends[number]) + len(batch), 1).to_pylist()
        return dict(found)

    def _rows_at(self, places: list[int]) -> list[dict[str, Any]]:
        if self._rows is None:
            return [{} for _ in places]
        if isinstance(self._rows, list):
            return [self._rows[i] for i in places]
        return list(self._rows.select(places).to_list())  # decodes JSON in text


def write_batches(file: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes record batches to a new file. Raises OSError."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
