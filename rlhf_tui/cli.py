"""The command line: ``rlhf-tui``.

Each command is a short function in :mod:`rlhf_tui.commands`; this module finds it, and turns our
errors into one line and an exit code.
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
    "logs": "read", "rm": "manage", "export": "manage", "doctor": "manage",
    "attach": "view", "ctl": "steer", "note": "steer", "diff": "compare", "guardrails": "compare",
}  # fmt: skip
"""A command and its module, which is imported when it is asked for: attach does not wait for all
the others."""


class Commands(click.Group):
    """The commands of :data:`COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, as help lists them."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One of them; None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"rlhf_tui.commands.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
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
    """Train a language model with PPO against a reward model, and steer it while it runs.

    Without a command: the session browser.
    """
    if context.invoked_subcommand is None:
        from rlhf_tui.commands import view  # noqa: PLC0415 - as the others, when it is asked for

        view.browse(root)
    elif context.get_parameter_source("root") is ParameterSource.COMMANDLINE:
        # The command has the same option of its own, which would look no further than this.
        os.environ["RLHF_TUI_SESSIONS"] = str(root)


def main() -> None:
    """The entry point. Exits 0 done, 1 failed, 2 wrong input, 3 no such session, 4 timed out."""
    try:
        cli.main(standalone_mode=False)
    except RlhfError as error:
        _end(str(error), error.exit_code)
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        _end(error.format_message() + where, 2)
    except click.ClickException as error:
        _end(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        _end("interrupted", 130)
    except BrokenPipeError:
        # The reader is gone, and that is all right; Python's last flush must not complain.
        sys.stdout = None
        sys.exit(0)


def _end(text: str, code: int) -> None:
    click.echo(f"rlhf-tui: {one_line(text)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
