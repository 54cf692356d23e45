"""Options of commands that print rows: --format and -o."""

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from engine.errors import UserInputError
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import print_json_rows, say
from rlhf_tui.table_files import FORMATS, csv_text, write_file
from rlhf_tui.text import sanitise


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options --format and -o of commands that print rows; see :func:`printed_rows`."""
    output = click.option(
        "-o",
        "output",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write a file: .csv, .json or .parquet, or any name with --format.",
    )
    form = click.option(
        "--format", "form", type=click.Choice(FORMATS), help="Print all fields in this format."
    )
    return form(output(command))


def printed_rows(
    rows: Iterable[dict[str, Any]], form: str | None, output: Path | None, names: Sequence[str]
) -> bool:
    """Prints rows in a format, or writes them to a file.

    Args:
        rows: the objects that --json prints; not read if nothing is to be printed.
        form: from --format.
        output: from -o.
        names: names of the columns if there are no rows.

    Returns:
        False if neither was asked for.

    Raises:
        UserInputError: the format is unknown, cannot be printed, or the file cannot be written.
    """
    if form is None and output is None:
        return False
    form = form or str(output).rpartition(".")[2]
    if form not in FORMATS:
        raise UserInputError(
            f"-o {output}: name the file .csv, .json or .parquet, or give --format"
        )
    if output is not None:
        count = itertools.count()  # not len(): rows are made while they are written
        counted = (row for row, _ in zip(rows, count, strict=False))
        size = write_file(counted, form, output, names)
        say(f"{output}: {fmt.plural(next(count), 'row')}, {fmt.size(size)}")
    elif form == "json":
        print_json_rows(rows)
    elif form == "parquet":
        raise UserInputError("--format parquet is not text: give -o FILE")
    else:
        text = csv_text(list(rows), names)
        # A file or a program gets the text as it is; a terminal would run its control sequences.
        text = sanitise(text) if sys.stdout.isatty() else text
        click.echo(text.encode("utf-8", "backslashreplace"), nl=False)
    return True
