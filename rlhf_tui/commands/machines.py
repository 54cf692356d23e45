"""Commands for runs over several machines: join; launch, on every machine of a scheduler's job."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import click

from engine.config import file as config_file
from engine.config.rules.launch import check_address
from engine.errors import UserInputError
from engine.journal.reader import JournalReader
from engine.launch import scheduler
from engine.launch.parent_death import PARENT_VARIABLE
from engine.launch.secret import SECRET_VARIABLE, read_secret
from engine.session.folder import SessionFolder, check_name
from engine.session.states import ENDED_STATES
from rlhf_tui.commands.options import FiniteRange, config_argument, override_option, sessions_option
from rlhf_tui.commands.run import is_done, is_started, start_or_resume

STOPPED_EARLY = 75
"""`launch.preempted_exit` under a scheduler, which starts the job again (EX_TEMPFAIL)."""
END_TIMEOUT = 60.0
"""Seconds that the first machine may take to end after its ranks."""
wait_option = click.option(
    "--wait",
    type=FiniteRange(min=1),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the first machine, also after each restart of the run.",
)


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks on this machine.  [default: from the run's configuration]",
)
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File with the run's secret.  [default: from RLHF_TUI_SECRET or RLHF_TUI_SECRET_FILE]",
)
@click.option(
    "--rollout", is_flag=True, help="Generate for the run; HOST:PORT is rollout.rendezvous."
)
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    metavar="PYTHON",
    help="With --rollout, the Python that has vLLM.  [default: this one, or that of make vllm]",
)
@wait_option
def join(
    address: str,
    processes: int | None,
    secret_file: Path | None,
    wait: float,
    python: Path | None,
    *,
    rollout: bool,
) -> None:
    """Join a run with this machine.

    HOST:PORT is the run's launch.rendezvous. The run waits until launch.nodes machines have joined,
    and prints where its secret is. With --rollout, this machine runs one of rollout.engines instead
    of ranks.
    """
    check_address(address)
    if rollout and processes is not None:
        raise UserInputError("--processes is for ranks; leave it out with --rollout")
    if python is not None and not rollout:
        raise UserInputError("--python is for vLLM; give it with --rollout")
    if secret_file is None and read_secret() is None:
        raise UserInputError(
            "no secret of the run: give --secret-file FILE, the file join.secret in the session's "
            f"folder, or export {SECRET_VARIABLE} here and on the first machine"
        )
    words = ["-P", "-m", *_joiner(address, processes, wait, secret_file)]
    if rollout:
        secret = str(secret_file.absolute()) if secret_file is not None else "-"
        chosen = str(python.absolute()) if python is not None else ""
        words = ["-P", "-m", "engine.launch.rollout.join", address, str(wait), secret, chosen]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 - our own module


@click.command()
@config_argument
@click.option(
    "--name", metavar="NAME",
    help="The session's name.  [default: from the scheduler's job, else from CONFIG]",
)  # fmt: skip
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=scheduler.DEFAULT_PORT,
    show_default=True,
    help="Port of the first machine, unless the scheduler or launch.rendezvous gives one.",
)
@wait_option
@override_option
@sessions_option
def launch(
    root: Path,
    overrides: tuple[str, ...],
    config: Path,
    name: str | None,
    port: int,
    wait: float,
) -> None:
    """Start or resume a run on all machines of a scheduler's job.

    Start it once on each machine: the first one runs the engine, as run --headless
    --resume-if-exists does, the others join. Reads the variables of SLURM, SkyPilot, torchrun
    (PET_*), Kubernetes' indexed jobs, or MASTER_ADDR. --sessions must be a folder that all machines
    share. Ends with 75 if the run was stopped before its end.
    """
    loaded = config_file.load(config, overrides)
    place = scheduler.placement(os.environ, socket.getfqdn())
    if place is None and loaded.launch.nodes > 1:
        raise UserInputError(
            f"launch.nodes is {loaded.launch.nodes}, and no scheduler says which of the machines "
            f"this is ({scheduler.KNOWN_SCHEDULERS})"
        )
    if not loaded.launch.preempted_exit:
        overrides = (*overrides, f"launch.preempted_exit={STOPPED_EARLY}")
    if name is None:
        name = _job_name(place) or config.stem
    session = SessionFolder(root.resolve() / check_name(name))
    machines = 1 if place is None else scheduler.machines(place, loaded.launch.nodes)
    if place is not None:
        overrides = (*overrides, f"launch.nodes={machines}")
    if place is not None and machines > 1:
        address = loaded.launch.rendezvous or scheduler.address(place, port)
        check_address(address)
        overrides = (*overrides, f"launch.rendezvous={address}")
        if place.machine:
            if not (is_started(session) and is_done(session, overrides)):
                sys.exit(_join_scheduled(session, address, wait))
            return
    start_or_resume(session, config, overrides, "headless")


def _join_scheduled(session: SessionFolder, address: str, wait: float) -> int:
    """Runs this machine's ranks until the run ends; returns the exit code of its engine.

    Schedulers start a machine again by its own exit code.
    """
    file = None if read_secret() else session.secret_file
    words = ["engine.launch.rank", *_joiner(address, None, wait, file), "scheduled"]
    parent = {PARENT_VARIABLE: str(os.getpid())}
    process = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", *words], env=os.environ | parent
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    if code:
        return code if code > 0 else 128 - code
    deadline = time.monotonic() + END_TIMEOUT
    while time.monotonic() < deadline:
        with JournalReader(session) as reader:
            meta = reader.meta()
        if meta.state in ENDED_STATES and meta.exit_code is not None:
            return meta.exit_code
        time.sleep(0.5)
    return 0


def _job_name(place: scheduler.Placement | None) -> str:
    """The name of a scheduler's job as that of a session; "" if it has none."""
    job = place.job if place is not None else None
    return re.sub(r"[^A-Za-z0-9._-]", "-", job or "").strip("._-")[-80:].lstrip("._-")


def _joiner(address: str, processes: int | None, wait: float, file: Path | None) -> list[str]:
    """The module that runs a machine's ranks, and its arguments.

    Args:
        address: `launch.rendezvous` of the run.
        processes: ranks on this machine; None: as the run's configuration says.
        wait: seconds to wait for the first machine.
        file: holds the run's secret; None: the environment has it.
    """
    secret = str(file.absolute()) if file is not None else "-"
    return [
        "engine.train.torchrun.join", address, str(processes or "auto"), str(wait), secret
    ]  # fmt: skip
