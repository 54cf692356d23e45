"""Writes the manual page from the help of the commands: ``python -m scripts.man_page``.

The wheel installs it under share/man/man1, where `man rlhf-tui` finds it in an active environment.
A test compares it with the code.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from rlhf_tui.cli import cli

PAGE = Path(__file__).parent.parent / "docs" / "rlhf-tui.1"
NAME = "rlhf-tui"
GLOBAL = ("--help", "--sessions", "--colors")
"""Options that stand at the top and hold for every command."""
HEAD = r""".\" Written by scripts/man_page.py from the help of the commands: do not edit.
.TH RLHF\-TUI 1
.SH NAME
rlhf\-tui \- train a language model with PPO, watch and steer it in the terminal
.SH SYNOPSIS
.B rlhf\-tui
[OPTIONS] [COMMAND [ARGUMENTS]]
.SH DESCRIPTION
"""
TAIL = r""".SH EXIT STATUS
0 success, 1 the run failed or the command was rejected, 2 invalid input, 3 no such session or
checkpoint, or no engine, 4 timeout, 130 interrupted.
.SH ENVIRONMENT
.TP
.B RLHF_TUI_SESSIONS
The folder of sessions. Default: ./sessions.
.TP
.B RLHF_TUI_COLORS
The terminal's colours: auto, truecolor, 256, 16 or none.
.TP
.B NO_COLOR
If it is set, no colour codes are sent.
.SH FILES
.TP
.I sessions/NAME/
A session: config.yaml, journal.db, samples.db, checkpoints/, engine.log.
"""


def page() -> str:
    """The text of the page, in the man macros of troff."""
    context = click.Context(cli, info_name=NAME, **cli.context_settings)
    lines = [*_paragraphs(cli.help or ""), ".SH OPTIONS", *_options(cli, context)]
    lines.append(".SH COMMANDS")
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        lines += _command(command, click.Context(command, parent=context, info_name=name))
    return HEAD + "\n".join(lines) + "\n" + TAIL


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f".SS {_escaped(usage.removeprefix(f'{NAME} '))}"
    yield from _paragraphs(command.help or "")
    yield from _options(command, context, known=GLOBAL)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            verb = command.get_command(context, name)
            if verb is not None and not verb.hidden:
                inner = click.Context(verb, parent=context, info_name=name)
                pieces = [name, *(p for p in verb.collect_usage_pieces(inner) if p != "[OPTIONS]")]
                yield from (".TP", f".B {_escaped(' '.join(pieces))}")
                yield _escaped(" ".join((verb.help or "").split()))


def _options(
    command: click.Command, context: click.Context, known: tuple[str, ...] = ("--help",)
) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        # An argument stands in the usage and has no help of its own.
        if record is not None and record[1] and not set(known) & set(parameter.opts):
            yield from (".TP", f".B {_escaped(record[0])}", _escaped(record[1]))


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a command's help; after a backspace lines are kept as they are."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            kept = [_escaped(line) for line in paragraph.splitlines()[1:]]
            yield from (".PP", ".nf", *kept, ".fi")
        else:
            yield from (".PP", _escaped(" ".join(paragraph.split())))


def _escaped(text: str) -> str:
    """Escapes text for troff: hyphens stay ASCII, and no line is a request."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
