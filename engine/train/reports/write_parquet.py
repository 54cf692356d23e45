"""Writes a table as Parquet: ``python -m engine.train.reports.write_parquet``.

Reads the table as JSON from standard input: column → values, which are numbers, texts, booleans or
null, of one kind in a column. Writes the file to standard output.
"""

import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """Writes the table."""
    columns = json.load(sys.stdin)
    file = io.BytesIO()
    pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), file)
    sys.stdout.buffer.write(file.getbuffer())


if __name__ == "__main__":
    main()
