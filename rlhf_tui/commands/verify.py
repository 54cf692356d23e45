"""The command that checks a session: verify."""

import sys
from pathlib import Path

import click
import msgspec

from engine.verification.verify import Contents
from engine.verification.verify import verify as verify_session
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    Tone,
    existing,
    json_option,
    name_argument,
    print_json,
    say,
    sessions_option,
)


@click.command()
@name_argument
@sessions_option
@json_option
def verify(root: Path, name: str, as_json: bool) -> None:
    """Check that a session is whole: files, checkpoints, history, labels, access.

    Changes nothing, and may be run on a live session. A problem is what was damaged or lost, or
    lets others in; a note is what a crash leaves behind and a resume clears up.
    """
    session = existing(root, name)
    verified = verify_session(session)
    if as_json:
        findings = msgspec.to_builtins(verified.findings)
        shown = {"name": name, "problems": verified.problems, "findings": findings}
        print_json(shown | msgspec.structs.asdict(verified.contents))
    else:
        for found in verified.findings:
            tone: Tone = "bad" if found.level == "problem" else "warn"
            say((found.level, tone), f": {found.check}: {found.text}; {found.advice}")
        say(f"{name}: {_checked(verified.contents)}: {_verdict(verified.problems)}")
    sys.exit(1 if verified.problems else 0)


def _checked(contents: Contents) -> str:
    words = ("checkpoint", "step", "command", "sample", "label")
    numbers = [fmt.plural(getattr(contents, f"{word}s"), word) for word in words]
    return f"{contents.state}, {', '.join(numbers)}"


def _verdict(problems: int) -> str:
    return fmt.plural(problems, "problem") if problems else "nothing is damaged or lost"
