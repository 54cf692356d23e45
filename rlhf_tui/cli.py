"""The command line: ``rlhf-tui``.

The commands are functions in :mod:`rlhf_tui.commands`. This module finds them and turns errors into
one line and an exit code.
"""

import contextlib
import difflib
import importlib
import os
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import click

from engine import __version__
from engine.errors import RlhfError, UserInputError
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import colors_option, sessions_option
from rlhf_tui.commands.shell_complete import Group
from rlhf_tui.text import escape_unencodable, one_line

SECTIONS = {
    "Start and continue": {
        "demo": "run", "init": "init", "check": "check", "plan": "plan", "run": "run",
        "resume": "run", "fork": "run",
    },
    "Watch and steer": {
        "ls": "reading.sessions", "attach": "view", "status": "reading.sessions", "ctl": "steer",
        "note": "steer",
    },
    "Read": {
        "metrics": "reading.metrics_and_samples", "samples": "reading.metrics_and_samples",
        "events": "reading.logs", "logs": "reading.logs", "diff": "reading.compare",
        "guardrails": "reading.compare", "replay": "view", "report": "reading.report",
    },
    "Use the result": {"eval": "evaluate", "export": "export", "reward": "reward"},
    "Several machines": {"launch": "machines", "join": "machines", "mirror": "view"},
    "Maintain": {
        "doctor": "doctor", "verify": "check", "notify": "notify", "rm": "remove",
        "completion": "integration.completion", "mcp": "integration.mcp",
    },
}  # fmt: skip
"""Module of :mod:`rlhf_tui.commands` by command, in the sections of the help. A module is imported
when a command of it runs, which keeps the start of attach short."""
MODULES = {name: module for section in SECTIONS.values() for name, module in section.items()}

MAX_ERROR = 1000
"""Maximum length of an error line: one that repeats the input may be as long as the input."""


class Commands(Group):
    """The commands of the modules in :data:`MODULES`, which are imported lazily."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(MODULES)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands in their sections."""
        longest = max(map(len, MODULES))
        for title, names in SECTIONS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            room = formatter.width - longest - 6
            rows = [
                (f"{name:<{longest}}", command.get_short_help_str(room))
                for name, command in commands
                if command is not None and not command.hidden
            ]
            with formatter.section(title):
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of these arguments. Raises UsageError, with the command that may be meant."""
        name = args[0]
        if name not in MODULES and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"no command '{name}'{_meant(name)}", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command; None if there is no such command."""
        if cmd_name not in MODULES:
            return None
        module = importlib.import_module(f"rlhf_tui.commands.{MODULES[cmd_name]}")
        name = "evaluate" if cmd_name == "eval" else cmd_name  # eval is a builtin function
        command: click.Command = getattr(module, name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command. Raises ReaderGoneError where click would exit with 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGoneError from error


def _meant(name: str) -> str:
    """What may be meant by a command that does not exist, to follow it in a message."""
    from engine.protocol.commands import COMMANDS  # noqa: PLC0415 - only needed here

    if name in COMMANDS:
        return f"; to steer a run, type {fmt.command('ctl', 'NAME', name)}"
    near = difflib.get_close_matches(name, MODULES, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


class ReaderGoneError(Exception):
    """The reader of the output has closed the pipe, as `head` does; this is not an error."""


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@sessions_option
@colors_option
@click.pass_context
@click.version_option(__version__, prog_name="rlhf-tui")
def cli(context: click.Context, root: Path) -> None:
    """Train a language model with PPO against a reward model and steer the run.

    Without a command, opens the session browser.
    """
    if context.invoked_subcommand is None:
        from rlhf_tui.commands import view  # noqa: PLC0415 - imported lazily, as all commands

        view.browse(root)


def main() -> None:
    """The entry point.

    Exit codes: 0 success, 1 failure, 2 wrong input, 3 no such session, checkpoint or engine,
    4 timeout, 130 interrupted.
    """
    open_standard_files()
    escape_unencodable()
    try:
        cli.main(standalone_mode=False)
        sys.stdout.flush()  # here, where an error is still shown in one line
    except RlhfError as error:
        _exit(str(error), error.exit_code)
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _exit(in_plain_words(error.format_message()) + hint, 2)
    except click.ClickException as error:
        _exit(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        _exit("interrupted", 130)
    except (ReaderGoneError, BrokenPipeError):
        _discard_output()
        sys.exit(0)
    except UnicodeEncodeError:
        _exit("an argument is not valid UTF-8; give text in UTF-8", UserInputError.exit_code)
    except (OSError, sqlite3.Error) as error:
        _discard_output()  # it may be what cannot be written
        _exit(_one_sentence(error), 1)


def in_plain_words(message: str) -> str:
    """An error message of click in one line, without its names for numbers."""
    message = message.replace("\n\t", " ")
    for name, plain in (("float", "number"), ("integer", "whole number")):
        message = re.sub(rf"not a valid {name}( range)?", f"not a {plain}", message)
    return re.sub(r"(\S+) is not in the range x>=(\S+)\.$", r"\1 is less than \2.", message)


def open_standard_files() -> None:
    """Opens /dev/null for standard files that the caller has closed.

    Otherwise the next file that is opened gets their number, and Python has no `sys.stdout`.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            file = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - open to the end
            setattr(sys, name, file)


def _discard_output() -> None:
    """Discards stdout, so that Python does not flush it at exit, which would fail again."""
    sys.stdout = None


def _one_sentence(error: OSError | sqlite3.Error) -> str:
    if isinstance(error, sqlite3.Error):
        return f"cannot use the session's files: {error}"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "the current folder has been deleted: change to another one"
    if error.filename is None:  # stdout, stderr or a file that was open already
        return f"cannot write the output: {error.strerror or error}"
    return f"{error.strerror}: {os.fsdecode(error.filename)}"


def _exit(text: str, code: int) -> None:
    with contextlib.suppress(OSError):  # the place for errors may be full or closed, too
        click.echo(f"rlhf-tui: {one_line(text, MAX_ERROR)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
