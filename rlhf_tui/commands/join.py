"""``rlhf-tui join``: one more machine for a run of several."""

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
    help="Ranks on this machine; as many as the run's configuration says when left out.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the first machine, at first and when the run starts again.",
)
def join(address: str, processes: int | None, wait: float) -> None:
    """Lend this machine to a run that waits for it (launch.nodes > 1) at HOST:PORT."""
    check_address(address)
    sys.stdout.flush()
    words = ["-m", "engine.train.torchrun.join", address, str(processes or "auto"), str(wait)]
    os.execv(sys.executable, [sys.executable, *words])  # noqa: S606 - ourselves
