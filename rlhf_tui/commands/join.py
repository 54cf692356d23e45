"""The command that adds a machine to a multi-machine run: join."""

import os
import sys

import click

from engine.config.rules import check_address


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks on this machine.  [default: as the run's configuration says]",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the first machine, also after each restart of the run.",
)
def join(address: str, processes: int | None, wait: float) -> None:
    """Join a run with this machine.

    HOST:PORT is the run's launch.rendezvous; the run waits until launch.nodes machines have joined.
    """
    check_address(address)
    sys.stdout.flush()
    arguments = ["-m", "engine.train.torchrun.join", address, str(processes or "auto"), str(wait)]
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - our own module
