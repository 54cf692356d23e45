"""Writes a table as Parquet: ``python -m engine.train.reports.write_parquet FILE``.

Reads it as JSON on standard input: column → values, which are numbers, texts, booleans or null, of
one kind in a column. FILE is replaced once the table is complete.
"""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """Writes the table."""
    file = Path(sys.argv[1])
    columns = json.load(sys.stdin)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
