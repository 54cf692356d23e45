"""Rows of a session as CSV, JSON or Parquet."""

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import RlhfError, UserInputError
from rlhf_tui.output_file import write_output

FORMATS = ("csv", "json", "parquet")
PART_ROWS = 1000
"""Number of rows in a part of :func:`json_parts`."""
Row = dict[str, Any]


def columns_of(rows: Sequence[Row], names: Sequence[str] = ()) -> dict[str, list[Any]]:
    """The columns of rows, in order of appearance; missing cells are None.

    Without rows, the columns are `names`, so that a table always has a header. The entries of a
    mapping become columns `KEY/NAME`, lists become JSON.
    """
    flat = [dict(_flat(row)) for row in rows]
    found = dict.fromkeys(name for row in flat for name in row) or names
    return {name: [row.get(name) for row in flat] for name in found}


def _flat(row: Row) -> Iterable[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", inner) for name, inner in value.items())
        elif isinstance(value, list):
            yield key, json.dumps(value)
        else:
            yield key, value


def json_parts(rows: Iterable[Row]) -> Iterator[str]:
    """Rows as one JSON list on a line, in parts, so that not all of them have to be in memory.

    Reads the first rows before it begins: if that fails, nothing has been printed.
    """
    rows = iter(rows)
    before = "["
    while texts := [json.dumps(row, allow_nan=False) for row in itertools.islice(rows, PART_ROWS)]:
        yield before + ", ".join(texts)
        before = ", "
    yield "[]\n" if before == "[" else "]\n"


def csv_text(rows: Sequence[Row], names: Sequence[str] = ()) -> str:
    """Rows as CSV with a header, lines ended by a newline; None is an empty field."""
    columns = columns_of(rows, names)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def write_file(rows: Iterable[Row], form: str, output: Path, names: Sequence[str]) -> int:
    """Writes rows to a file, which is replaced if it exists.

    Args:
        rows: the rows.
        form: one of :data:`FORMATS`.
        output: the file.
        names: names of the columns if there are no rows.

    Returns:
        The number of bytes written.

    Raises:
        UserInputError: the file cannot be written.
        RlhfError: Parquet cannot be written, as without pyarrow.
    """
    try:
        if not output.parent.is_dir():
            raise FileNotFoundError(2, os.strerror(2))
        return write_output(output, _contents(rows, form, names))
    except OSError as error:
        raise UserInputError(f"cannot write {output}: {error.strerror}; give another -o") from error


def _contents(rows: Iterable[Row], form: str, names: Sequence[str]) -> bytes | Iterator[bytes]:
    if form == "json":
        return (part.encode() for part in json_parts(rows))
    if form == "parquet":
        return _parquet(columns_of(list(rows), names))
    return csv_text(list(rows), names).encode()


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engine.train.reports.write_parquet"],
        input=json.dumps(columns).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        if "pyarrow" in lines[-1] and "ModuleNotFoundError" in lines[-1]:
            raise RlhfError("Parquet needs pyarrow: pip install pyarrow, or use --format csv")
        raise RlhfError(f"cannot write Parquet: {lines[-1]}")
    return done.stdout
