"""Commands that start an engine: demo, run, resume, fork."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from engine import configfile, starter
from engine.config import RunConfig
from engine.record import Record
from engine.session import Session, create, free_name
from engine.start import Start, check_inputs
from engine.start import fork as start_fork
from engine.start import resume as start_resume
from rlhf_tui.commands.options import (
    existing,
    name_argument,
    override_option,
    say,
    sessions_option,
    who,
)

headless_option = click.option(
    "--headless", is_flag=True, help="Stay in the foreground, one line a step."
)
new_name_option = click.option("--name", metavar="NAME", help="What to call the session.")
reseed_option = click.option(
    "--reseed", is_flag=True, help="Sample anew rather than meet the same answers again."
)


def starting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that starts an engine."""
    return headless_option(override_option(sessions_option(command)))


@click.command()
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="PPO steps.")
@new_name_option
@starting
def demo(
    root: Path, overrides: tuple[str, ...], headless: bool, name: str | None, steps: int | None
) -> None:
    """Train the starter model: a few minutes on two cores, no downloads."""
    given = [*overrides, *([f"train.steps={steps}"] if steps else [])]
    config = configfile.load(starter.FOLDER / "demo.yaml", given)
    _start_new(root.resolve(), name, "demo", config, headless)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@new_name_option
@starting
def run(
    root: Path, overrides: tuple[str, ...], headless: bool, name: str | None, config: Path
) -> None:
    """Start the run that CONFIG, a YAML file, describes."""
    loaded = configfile.load(config, overrides)
    _start_new(root.resolve(), name, config.stem, loaded, headless)


@click.command()
@name_argument
@click.option(
    "--from", "from_step", type=click.IntRange(min=1), metavar="STEP",
    help="Start afresh from this checkpoint.",
)  # fmt: skip
@reseed_option
@starting
def resume(
    root: Path,
    overrides: tuple[str, ...],
    headless: bool,
    name: str,
    from_step: int | None,
    reseed: bool,
) -> None:
    """Go on with a session from its last checkpoint."""
    session = existing(root, name)
    session.acquire().release()  # refuses a living one, naming its engine
    start = start_resume(
        session, from_step=from_step, reseed=reseed, overrides=list(overrides), who=who()
    )
    total = configfile.override(session.config(), overrides).train.steps
    if start.from_step >= total:
        say(
            f"session '{name}' has finished its {total} steps; to extend it: "
            f"rlhf-tui resume {name} -o train.steps={2 * total}"
        )
        return
    _become_engine(session, start, headless)


@click.command()
@name_argument
@click.option(
    "--from", "from_step", type=click.IntRange(min=1), metavar="STEP", required=True,
    help="The checkpoint to branch from.",
)  # fmt: skip
@click.option("--name", "new_name", metavar="NEW", required=True, help="The new session's name.")
@reseed_option
@starting
def fork(
    root: Path,
    overrides: tuple[str, ...],
    headless: bool,
    name: str,
    from_step: int,
    new_name: str,
    reseed: bool,
) -> None:
    """Branch a new session off a checkpoint of another."""
    session = existing(root, name)
    child, start = start_fork(
        session, new_name, from_step=from_step, reseed=reseed, overrides=list(overrides), who=who()
    )
    _become_engine(child, start, headless)


def _start_new(root: Path, name: str | None, stem: str, config: RunConfig, headless: bool) -> None:
    check_inputs(config)
    session = create(root, name or free_name(root, stem), config)
    _become_engine(session, Start(who=who()), headless)


def _become_engine(session: Session, start: Start, headless: bool) -> None:
    """Turns this process into the session's engine, in the foreground."""
    if not headless:
        click.echo("rlhf-tui: staying in the foreground, as with --headless", err=True)
    with Record(session) as record:
        again = bool(record.attempts())
    words = f"going on from step {start.from_step}" if again else "starting"
    click.echo(f"session {session.name}: {words}; folder {session.folder}", err=True)
    text = msgspec.json.encode(start).decode()
    sys.stdout.flush()
    os.execv(  # noqa: S606 - ourselves
        sys.executable, [sys.executable, "-m", "rlhf_tui.headless", str(session.folder), text]
    )
