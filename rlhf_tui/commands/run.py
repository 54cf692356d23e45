"""Commands that start an engine: demo, run, resume, fork."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from engine import starter
from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.journal.reader import JournalReader
from engine.launch.background import start_engine, start_or_remove
from engine.launch.failed_start import NewSession, is_failed_start
from engine.launch.start import create_session, steps_done
from engine.launch.start import fork as start_fork
from engine.launch.start import resume as start_resume
from engine.launch.start_options import StartOptions, start_variable
from engine.session.folder import SessionFolder, check_name
from rlhf_tui import format as fmt
from rlhf_tui.commands import view
from rlhf_tui.commands.checkpoint_step import StepChoice, checkpoint_step, step_choice
from rlhf_tui.commands.options import (
    config_argument,
    existing,
    is_terminal,
    name_argument,
    override_option,
    say,
    sessions_option,
    why_no_terminal,
)
from rlhf_tui.commands.shell_complete import complete_step
from rlhf_tui.identity import who
from rlhf_tui.text import one_line

headless_option = click.option(
    "--headless", is_flag=True, help="Run in the foreground; print a line per step."
)
detach_option = click.option(
    "--detach", is_flag=True, help="Start the engine in the background and exit."
)
LOADING_TIMEOUT = 60.0
"""Seconds that `--detach` waits for errors while models load; loading continues after it."""
new_name_option = click.option("--name", metavar="NAME", help="The session's name.")
reseed_option = click.option(
    "--reseed", is_flag=True, help="Use a new random seed, to sample different responses."
)


def starting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of every command that starts an engine.

    The command gets `mode`: headless, detach or None for the dashboard.
    """

    @functools.wraps(command)
    def with_mode(*, headless: bool, detach: bool, **options: Any) -> Any:
        if headless and detach:
            raise UserInputError(
                "give one of --headless (in the foreground) and --detach (in the background)"
            )
        mode = "headless" if headless else "detach" if detach else None
        return command(mode=mode, **options)

    return headless_option(detach_option(override_option(sessions_option(with_mode))))


@click.command()
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Number of PPO steps.")
@new_name_option
@starting
def demo(
    root: Path, overrides: tuple[str, ...], mode: str | None, name: str | None, steps: int | None
) -> None:
    """Train the starter model: minutes on two cores, no downloads."""
    overrides = (*overrides, *([f"train.steps={steps}"] if steps else []))
    config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    _start_new(root.resolve(), name, "demo", config, mode)


@click.command()
@config_argument
@new_name_option
@click.option(
    "--resume-if-exists", is_flag=True,
    help="With --name: if the session exists and has not finished, resume it, whatever CONFIG "
    "says.",
)  # fmt: skip
@starting
def run(
    root: Path,
    overrides: tuple[str, ...],
    mode: str | None,
    name: str | None,
    config: Path,
    resume_if_exists: bool,
) -> None:
    """Start a run from a configuration file in YAML."""
    if resume_if_exists:
        if name is None:
            raise UserInputError("--resume-if-exists needs --name NAME, the session to resume")
        session = SessionFolder(root.resolve() / check_name(name))
        start_or_resume(session, config, overrides, mode)
        return
    loaded = config_file.load(config, overrides)
    _start_new(root.resolve(), name, config.stem, loaded, mode)


def is_done(session: SessionFolder, overrides: tuple[str, ...]) -> bool:
    """Whether the run has finished and no override of `train` extends it; if so, prints that.

    It may have ended before its last step, by `train.max_hours` or `train.stop_at`. A scheduler
    that repeats the command must not continue it.
    """
    with JournalReader(session) as reader:
        if reader.state() != "finished":
            return False
        step, reason = reader.last_step(), reader.meta().message
    if any(item.partition("=")[0].split(".")[0].strip() == "train" for item in overrides):
        total = config_file.override(session.config(), overrides).train.steps
        if step < total:
            return False
    why = f" ({reason})" if reason else ""
    more = ["-o", f"train.steps={2 * step}"] if step >= session.config().train.steps else []
    on = fmt.command("resume", session.name, *more, root=session.folder.parent)
    say(f"session '{session.name}' has finished at step {step}{why}; to train on: {on}")
    return True


def is_started(session: SessionFolder) -> bool:
    """Whether there is a session to resume, rather than none or one that failed to start."""
    return session.config_file.is_file() and not is_failed_start(session)


def start_or_resume(
    session: SessionFolder, config: Path, overrides: tuple[str, ...], mode: str | None
) -> None:
    """Resumes the session unless it has finished; starts it if there is none."""
    if not is_started(session):
        loaded = config_file.load(config, overrides)
        _start_new(session.folder.parent, session.name, config.stem, loaded, mode)
    elif not is_done(session, overrides):
        _resume(session, overrides, mode)


@click.command()
@name_argument
@click.option(
    "--from", "from_step", type=step_choice, shell_complete=complete_step, metavar="STEP",
    help="Resume from this checkpoint, or from the last or the best; later steps become an "
    "abandoned branch.",
)  # fmt: skip
@reseed_option
@starting
def resume(
    root: Path,
    overrides: tuple[str, ...],
    mode: str | None,
    name: str,
    from_step: StepChoice | None,
    reseed: bool,
) -> None:
    """Resume a session from its last checkpoint."""
    session = existing(root, name)
    session.acquire().release()  # raises if the session is live: its last and best may change
    step = None if from_step is None else checkpoint_step(session, from_step)
    _resume(session, overrides, mode, from_step=step, reseed=reseed)


def _resume(
    session: SessionFolder,
    overrides: tuple[str, ...],
    mode: str | None,
    *,
    from_step: int | None = None,
    reseed: bool = False,
) -> None:
    start = start_resume(
        session, from_step=from_step, reseed=reseed, overrides=list(overrides), who=who()
    )
    if (total := steps_done(session, start)) is not None:
        more, root = f"train.steps={2 * start.from_step}", session.folder.parent
        say(
            f"session '{session.name}' has finished its {fmt.plural(total, 'step')}; to extend it: "
            + fmt.command("resume", session.name, "-o", more, root=root)
        )
        return
    _begin(session, start, mode)


@click.command()
@name_argument
@click.option(
    "--from", "from_step", type=step_choice, shell_complete=complete_step, default="last",
    metavar="STEP", show_default=True,
    help="The checkpoint to fork from, or last or best.",
)  # fmt: skip
@click.option("--name", "new_name", metavar="NEW", required=True, help="The new session's name.")
@click.option("--ema", is_flag=True, help="Begin with the averaged policy of train.ema.")
@reseed_option
@starting
def fork(
    root: Path,
    overrides: tuple[str, ...],
    mode: str | None,
    name: str,
    from_step: StepChoice,
    new_name: str,
    ema: bool,
    reseed: bool,
) -> None:
    """Fork a new session from a checkpoint of another."""
    session = existing(root, name)
    step = checkpoint_step(session, from_step)
    old = session.config()
    child, start = start_fork(
        session, new_name, from_step=step, reseed=reseed, overrides=list(overrides), who=who(),
        ema=ema,
    )  # fmt: skip
    if kept := config_file.kept_defaults(old, overrides):
        values = ", ".join(
            f"{key} {fmt.value_text(value)} (default now {fmt.value_text(default)})"
            for key, (value, default) in kept.items()
        )
        _show_notice(f"kept from '{name}': {values}; -o changes them")
    _begin(child, start, mode)


def _start_new(
    root: Path, name: str | None, stem: str, config: RunConfig, mode: str | None
) -> None:
    _begin(create_session(root, name, stem, config), StartOptions(who=who()), mode)


def _begin(session: SessionFolder, start: StartOptions, mode: str | None) -> None:
    """Starts the engine; `mode` is headless, detach or None for the dashboard."""
    if mode == "detach":
        _detach(session, start)
    elif mode == "headless" or not is_terminal():
        if mode is None:
            click.echo(f"rlhf-tui: {why_no_terminal()}: continuing as with --headless", err=True)
        _become_engine(session, start)
    else:
        _watch(session, start)


def _watch(session: SessionFolder, start: StartOptions) -> None:
    """Starts the engine in the background and opens the dashboard while it loads."""
    new = NewSession(session, start)
    start_engine(session, start, timeout=0.0)
    code = view.open_screen(session.folder.parent, session)
    with JournalReader(session) as reader:
        meta = reader.meta()
    if new.remove_if_unused(meta.exit_code):
        raise UserInputError(meta.message)
    sys.exit(code)


def _detach(session: SessionFolder, start: StartOptions) -> None:
    pid = start_or_remove(session, start, timeout=LOADING_TIMEOUT, notice=_show_notice)
    attach = fmt.command("attach", session.name, root=session.folder.parent)
    say(f"session {session.name}: engine pid {pid}; open it: {attach}")


def _show_notice(text: str) -> None:
    click.echo(f"rlhf-tui: {one_line(text)}", err=True)


def _become_engine(session: SessionFolder, start: StartOptions) -> None:
    """Turns this process into the session's engine, in the foreground."""
    action = f"resuming from step {start.from_step}" if start.from_step else "starting"
    if start.origin:
        action = f"forked from step {start.origin['step']} of {start.origin['from']}"
    click.echo(one_line(f"session {session.name}: {action}; folder {session.folder}"), err=True)
    sys.stdout.flush()
    words = [sys.executable, "-P", "-m", "rlhf_tui.headless", str(session.folder)]
    # Held until that module is imported and handles it: Python would print a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.execve(sys.executable, words, os.environ | start_variable(start))  # noqa: S606 - our own
