"""Commands that print what a session logged: events, logs."""

import time
from collections import deque
from pathlib import Path

import click

from engine.errors import SessionError
from engine.journal.reader import JournalReader
from rlhf_tui.commands.options import (
    existing_or_live,
    json_option,
    last_option,
    optional_name_argument,
    print_json,
    print_json_rows,
    say,
    sessions_option,
)
from rlhf_tui.commands.reading.event_lines import event_lines
from rlhf_tui.text import one_line, sanitise

FOLLOW_INTERVAL = 0.2
"""Seconds between reads of a log that is followed."""


@click.command()
@optional_name_argument
@sessions_option
@last_option
@json_option
def events(root: Path, name: str | None, last: int | None, as_json: bool) -> None:
    """Print what happened in a session, from start to end.

    States, commands, alerts, crashes, checkpoints and notes. Without NAME: the only live session.
    --json prints all fields of the events, with ids, values and samples.
    """
    with JournalReader(existing_or_live(root, name)) as reader:
        rows, attempts = reader.events(last), reader.attempts()
        crashed = reader.state() == "crashed"
    if as_json:
        print_json_rows(r.as_json() for r in rows)
        return
    for line in event_lines(rows, attempts, crashed=crashed):
        say((one_line(line.columns), line.tone))


@click.command()
@optional_name_argument
@sessions_option
@last_option
@click.option("-f", "--follow", is_flag=True, help="Keep printing until the engine exits.")
@json_option
def logs(root: Path, name: str | None, last: int | None, follow: bool, as_json: bool) -> None:
    """Print the engine's log.

    Without NAME: that of the only live session.
    """
    session = existing_or_live(root, name)
    if not session.log_file.exists():
        say("[]" if as_json else f"session '{session.name}' has no log yet")
        return
    if not session.log_file.is_file():  # opening a pipe would wait for its writer
        raise SessionError(f"{session.log_file} is not a regular file; move it away")
    with session.log_file.open(encoding="utf-8", errors="replace", newline="\n") as file:
        # A progress bar rewrites its line with \r: only its last state is printed.
        shown = (line.rstrip("\r\n").rsplit("\r", 1)[-1] for line in file)
        lines = deque((line for line in shown if line), last or None)
        if as_json:
            print_json(list(lines))
            return
        for line in lines:
            say(sanitise(line))
        while follow:
            live = session.is_live()  # before the read, which then includes the last lines
            if new := file.read():
                click.echo(sanitise(new.replace("\r", "\n")), nl=False)
            elif live:
                time.sleep(FOLLOW_INTERVAL)
            else:
                return
