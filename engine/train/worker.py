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
from typing import NoReturn

import msgspec
import torch
from transformers.utils.logging import disable_progress_bar

from engine.config.schema import LaunchConfig, RunConfig
from engine.config.settings import settings_of
from engine.errors import LinkError, RlhfError, UserInputError
from engine.launch.environment import LAUNCH_VARIABLE, PARENT_VARIABLE
from engine.protocol.rank_messages import Begin, Failed, Notice, Ready, StepReport
from engine.session.folder import Session
from engine.train.boundary import Boundary
from engine.train.distributed.ranks import RankGroup, is_peer_loss
from engine.train.link import Link
from engine.train.load import load_run
from engine.train.models import memory_check
from engine.train.reports.tensorboard import EventFiles
from engine.train.run import Run
from engine.train.step import train_step

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs until the run is over; every way out is told to the supervisor."""
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    for chatty in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Bars belong on a terminal; here they would fill engine.log with carriage returns.
    disable_progress_bar()
    session = Session(Path(sys.argv[1]))
    # The ranks have not met yet. Those beside the supervisor, which alone have a link, will be the
    # first; torchrun's own numbers begin on whichever machine's name comes first.
    link = Link(int(os.environ.get("LOCAL_RANK", "0")))
    ranks: RankGroup | None = None
    try:
        ranks = RankGroup(msgspec.json.decode(os.environ[LAUNCH_VARIABLE], type=LaunchConfig))
        link.rank = ranks.rank
        if not ranks.is_lead:  # the first one speaks for all
            logging.getLogger().setLevel(logging.WARNING)
        train(session, link, ranks)
    except LinkError:
        raise
    except Exception as error:
        link.send(describe(error, ranks, link.rank))
        traceback.print_exc()
        leave(getattr(error, "exit_code", 1))
    if ranks.size > 1:
        ranks.final_barrier()
        leave(0)


def leave(code: int) -> NoReturn:
    """Ends at once: threads of process groups may wait for ranks that wait for this one.

    Taken down with the interpreter, they also abort it now and then, which reads like a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def describe(error: Exception, ranks: RankGroup | None, rank: int) -> Failed:
    """A rank's last words: what happened, and whether it is the cause or an echo."""
    if isinstance(error, UserInputError):
        return Failed(rank=rank, text=str(error), user_input=True)
    # On purpose: starting again would meet it again. A bare exception may be the hardware's.
    known = isinstance(error, RlhfError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    trace = traceback.format_exc()
    if ranks is None or ranks.size == 1:
        return Failed(rank=rank, text=text, traceback=trace, final=known)
    if is_peer_loss(error):
        with contextlib.suppress(RuntimeError):  # the meeting place may be gone as well
            for word in ranks.errors_left():
                return msgspec.json.decode(word, type=Failed)
        text = f"rank {rank} lost the others: {text}"
        return Failed(rank=rank, text=text, traceback=trace, echo=True)
    failed = Failed(rank=rank, text=f"rank {rank}: {text}", traceback=trace, final=known)
    with contextlib.suppress(RuntimeError):
        ranks.leave_error(msgspec.json.encode(failed))
    return failed


def die_with_parent() -> None:
    """Dies with who started it, and leaves every other signal to the supervisor.

    A scheduler's broadcast, or ctrl+c, must not reach a rank before the supervisor has decided what
    to do: the step in hand is finished and saved first.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before the line above: torch takes seconds to import.
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):
        os.kill(os.getpid(), signal.SIGKILL)


def train(session: Session, link: Link, ranks: RankGroup) -> None:
    """The loop: obey, step, report, save."""
    begin, config = agree_on_start(session, link, ranks)

    def short_of_memory(text: str) -> None:
        link.send(Notice(step=begin.from_step, rule="memory", text=text))

    run = load_run(session, config, begin, ranks, link.phase, short_of_memory)
    boundary = Boundary(session, run, begin, link)
    link.send(Ready(info=facts(run), settings=msgspec.to_builtins(settings_of(run.config))))
    events = None
    if config.log.tensorboard and ranks.is_lead:
        events = EventFiles(session.tensorboard, begin.from_step)
        if not begin.from_step:
            events.hparams(config)

    with contextlib.closing(boundary):
        while boundary.more():
            step = run.state.step + 1
            began = time.monotonic()
            metrics, samples = train_step(run, step)
            changes = boundary.after(step, metrics, time.monotonic() - began)
            if events is not None:
                events.step(step, metrics, samples)
            settings = msgspec.to_builtins(settings_of(run.config))
            link.send(
                StepReport(
                    step=step,
                    metrics=metrics,
                    samples=samples,
                    settings=settings,
                    changes=changes,
                    ranks=run.clock.ranks,
                )
            )
            boundary.keeper.save_if_due()
        boundary.finish()
    if events is not None:
        events.close()


def agree_on_start(session: Session, link: Link, ranks: RankGroup) -> tuple[Begin, RunConfig]:
    """Rank 0 hears from the supervisor where to start and tells the others."""
    kind = tuple[Begin, RunConfig]
    mine = msgspec.msgpack.encode((link.begin(), session.config())) if ranks.is_lead else b""
    return msgspec.msgpack.decode(ranks.broadcast_bytes(mine), type=kind)


def facts(run: Run) -> dict[str, object]:
    """What is worth knowing about a run that begins."""
    return {
        "policy_parameters": sum(p.numel() for p in run.policy.parameters()),
        "trained_parameters": sum(p.numel() for p in run.policy.parameters() if p.requires_grad),
        "reference_parameters": sum(p.numel() for p in run.reference.parameters()),
        "prompts": len(run.prompts),
        "device": str(run.device),
        "ranks": run.ranks.size,
        "strategy": run.strategy,
        "threads": run.state.threads,
        "torch": str(torch.__version__),
        **memory_check.facts(run.memory),
    }


if __name__ == "__main__":
    main()
