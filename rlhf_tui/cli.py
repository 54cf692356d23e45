"""The command line: ``rlhf-tui``.

Each command is a short function in :mod:`rlhf_tui.commands`; this module gathers them and turns our
errors into one line and an exit code.
"""

import sys

import click

from engine import __version__
from engine.errors import RlhfError
from rlhf_tui.commands import compare, manage, read, run, steer
from rlhf_tui.text import one_line

COMMANDS: list[click.Command] = [
    run.demo, run.run, run.resume, run.fork,
    read.ls, read.status, read.metrics, read.samples, read.events, read.logs,
    manage.rm, manage.export, manage.doctor,
    steer.ctl, steer.note, compare.diff, compare.guardrails,
]  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rlhf-tui")
def cli() -> None:
    """Train a language model with PPO against a reward model, and steer it while it runs."""


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
