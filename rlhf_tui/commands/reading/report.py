"""The command that writes a session as one page: report."""

from pathlib import Path

import click

from engine.errors import UserInputError
from rlhf_tui.commands.options import existing, name_argument, say, sessions_option
from rlhf_tui.format import size
from rlhf_tui.output_file import write_output

SUFFIXES = (".html", ".htm", ".md")


@click.command()
@name_argument
@sessions_option
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file, .html or .md.  [default: NAME.html]",
)
@click.option("--diff", "other", metavar="OTHER", help="Compare with another session.")
def report(root: Path, name: str, output: Path | None, other: str | None) -> None:
    """Write a session as one self-contained page.

    The page has curves, interventions, samples and the configuration. The session can be live. An
    existing file is replaced.
    """
    from rlhf_tui.report import html, markdown  # noqa: PLC0415 - slow to import
    from rlhf_tui.report.data import read_report  # noqa: PLC0415

    session = existing(root, name)
    output = output or Path(f"{session.name}.html")
    if output.suffix not in SUFFIXES:
        raise UserInputError(f"-o {output}: name the file .html or .md")
    contents = read_report(session, other=existing(root, other) if other else None)
    form = markdown if output.suffix == ".md" else html
    data = form.page(contents).encode()
    try:
        write_output(output, data)
    except OSError as error:
        raise UserInputError(f"cannot write {output}: {error.strerror}; give another -o") from error
    say(f"{output}: {size(len(data))}")
