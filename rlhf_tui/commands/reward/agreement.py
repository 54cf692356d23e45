"""The command on the agreement of scores with judgements: reward agreement."""

from pathlib import Path

import click
import msgspec

from engine.agreement import Agreement
from engine.errors import RlhfError
from engine.journal.judgements.agreement import read_agreement
from engine.journal.reader import JournalReader
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    existing,
    json_option,
    name_argument,
    print_json,
    say,
    sessions_option,
)
from rlhf_tui.report import sections

STEPS_SHOWN = 20
"""Rows of the curve that are printed, evenly spaced."""


@click.command()
@name_argument
@sessions_option
@json_option
def agreement(root: Path, name: str, as_json: bool) -> None:
    """Show how far the scores of a session agree with its judgements."""
    session = existing(root, name)
    with JournalReader(session) as reader:
        found = read_agreement(reader)
    if as_json:
        print_json(_as_json(found))
        return
    if found.mean is None:
        attach = fmt.command("attach", name, root=session.folder.parent)
        raise RlhfError(
            f"session '{name}' has no judgements to compare: it needs labels good and bad, or "
            f"preferences (J on screen 3 of {attach})"
        )
    say(sections.agreement(found))
    curve = found.curve
    every = -(-len(curve) // STEPS_SHOWN)
    shown = curve[::-1][::every][::-1]  # with the last one
    say(fmt.table([[f"{s:,}", f"{v:.2f}"] for s, v in shown], ["step", "agreement"]))


def _as_json(found: Agreement) -> dict[str, object]:
    curve = [{"step": step, "agreement": value} for step, value in found.curve]
    fall = msgspec.to_builtins(found.fall)
    return {
        "judgements": len(found.points), "agreement": found.mean, "fall": fall, "curve": curve,
    }  # fmt: skip
