"""A rank's main: ``python -m engine.train.worker SESSION_FOLDER``.

Started by a supervisor, which it obeys and reports to over the link; it never outlives it.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import msgspec
import torch
from transformers.utils.logging import disable_progress_bar

from engine.errors import LinkError, RlhfError, UserInputError
from engine.protocol import Failed, Ready, StepReport
from engine.session import Session
from engine.train.boundary import Boundary
from engine.train.link import Link
from engine.train.load import load_run
from engine.train.step import Run, train_step
from engine.train.tensorboard import EventFiles

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs until the run is over; every way out is told to the supervisor."""
    parent = os.getppid()
    tie_to_parent(parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    for chatty in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Bars belong on a terminal; here they would fill engine.log with carriage returns.
    disable_progress_bar()
    session = Session(Path(sys.argv[1]))
    rank = int(os.environ.get("RANK", "0"))
    link = Link(rank)
    try:
        train(session, link)
    except LinkError:
        raise
    except UserInputError as error:
        link.send(Failed(rank=rank, text=str(error), user_input=True))
        sys.exit(error.exit_code)
    except Exception as error:
        # On purpose: starting again would meet it again. A bare exception may be the hardware's.
        known = isinstance(error, RlhfError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        trace = traceback.format_exc()
        link.send(Failed(rank=rank, text=text, traceback=trace, final=known))
        raise


def tie_to_parent(parent: int) -> None:
    """Dies with the supervisor, and leaves every other signal to it.

    A scheduler's broadcast, or ctrl+c, must not reach a rank before the supervisor has decided what
    to do: the step in hand is finished and saved first.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def train(session: Session, link: Link) -> None:
    """The loop: obey, step, report, save."""
    begin = link.begin()
    config = session.config()
    run = load_run(session, config, begin, link.phase)
    boundary = Boundary(session, run, begin, link)
    link.send(Ready(info=facts(run), settings=msgspec.to_builtins(run.state.settings)))
    events = EventFiles(session.tensorboard, begin.from_step) if config.log.tensorboard else None
    if events is not None and not begin.from_step:
        events.hparams(config)

    with contextlib.closing(boundary):
        while boundary.more():
            step = run.state.step + 1
            began = time.monotonic()
            metrics, samples = train_step(run, step)
            changes = boundary.after(step, metrics, time.monotonic() - began)
            if events is not None:
                events.step(step, metrics, samples)
            settings = msgspec.to_builtins(run.state.settings)
            link.send(
                StepReport(
                    step=step, metrics=metrics, samples=samples, settings=settings, changes=changes
                )
            )
            boundary.save_if_due()
        boundary.finish()
    if events is not None:
        events.close()


def facts(run: Run) -> dict[str, object]:
    """What is worth knowing about a run that begins."""
    return {
        "policy_parameters": sum(p.numel() for p in run.policy.parameters()),
        "reference_parameters": sum(p.numel() for p in run.reference.parameters()),
        "prompts": len(run.prompts),
        "device": str(run.device),
        "threads": run.state.threads,
        "torch": str(torch.__version__),
    }


if __name__ == "__main__":
    main()
