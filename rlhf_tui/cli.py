"""The command line: ``rlhf-tui``.

The commands are functions in :mod:`rlhf_tui.commands`. This module finds them and turns errors into
one line and an exit code.
"""

import importlib
import os
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from engine import __version__
from engine.errors import RlhfError
from rlhf_tui.commands.options import sessions_option
from rlhf_tui.text import one_line

COMMANDS = {
    "demo": "run", "run": "run", "resume": "run", "fork": "run", "join": "join", "plan": "plan",
    "ls": "read", "status": "read", "metrics": "read", "samples": "read", "events": "read",
    "logs": "read", "eval": "evaluate", "rm": "manage", "export": "manage", "doctor": "manage",
    "attach": "view", "ctl": "steer", "note": "steer", "diff": "compare", "guardrails": "compare",
}  # fmt: skip
"""Module of :mod:`rlhf_tui.commands` by command. A module is imported when a command of it runs,
which keeps the start of attach short."""


class Commands(click.Group):
    """The commands of :data:`COMMANDS`, imported lazily."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"rlhf_tui.commands.{COMMANDS[cmd_name]}")
        name = "evaluate" if cmd_name == "eval" else cmd_name  # eval is a builtin function
        command: click.Command = getattr(module, name)
        return command


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@sessions_option
@click.pass_context
@click.version_option(__version__, prog_name="rlhf-tui")
def cli(context: click.Context, root: Path) -> None:
    """Train a language model with PPO against a reward model and steer the run.

    Without a command: opens the session browser.
    """
    if context.invoked_subcommand is None:
        from rlhf_tui.commands import view  # noqa: PLC0415 - imported lazily, as all commands

        view.browse(root)
    elif context.get_parameter_source("root") is ParameterSource.COMMANDLINE:
        # The command has a --sessions option of its own, whose default is this variable.
        os.environ["RLHF_TUI_SESSIONS"] = str(root)


def main() -> None:
    """The entry point.

    Exit codes: 0 success, 1 failure, 2 wrong input, 3 no such session or engine, 4 timeout,
    130 interrupted.
    """
    try:
        cli.main(standalone_mode=False)
    except RlhfError as error:
        _exit(str(error), error.exit_code)
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _exit(error.format_message() + hint, 2)
    except click.ClickException as error:
        _exit(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        _exit("interrupted", 130)
    except BrokenPipeError:
        # The reader has closed the pipe, which is no error. Without stdout, Python does not flush.
        sys.stdout = None
        sys.exit(0)


def _exit(text: str, code: int) -> None:
    click.echo(f"rlhf-tui: {one_line(text)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
