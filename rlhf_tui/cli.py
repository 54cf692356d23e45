"""The command line: ``rlhf-tui``.

Each command is a short function in :mod:`rlhf_tui.commands`; this module gathers them and turns our
errors into one line and an exit code.
"""

import sys
from pathlib import Path

import click

from engine import __version__
from engine.errors import RlhfError
from rlhf_tui.commands import compare, join, manage, plan, read, run, steer, view
from rlhf_tui.commands.options import sessions_option
from rlhf_tui.text import one_line

COMMANDS: list[click.Command] = [
    run.demo, run.run, run.resume, run.fork, join.join, plan.plan,
    read.ls, read.status, read.metrics, read.samples, read.events, read.logs,
    manage.rm, manage.export, manage.doctor,
    view.attach, steer.ctl, steer.note, compare.diff, compare.guardrails,
]  # fmt: skip


@click.group(
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
        view.browse(root)


for command in COMMANDS:
    cli.add_command(command)


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
