"""A rank's main: ``python -m engine.train.worker SESSION_FOLDER``.

Started by a supervisor, which it obeys and reports to over the link; it never outlives it.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import msgspec
import torch

from engine.errors import CheckpointError, LinkError, RlhfError, UserInputError
from engine.protocol import (
    Applied,
    CheckpointComplete,
    CheckpointWritten,
    Ended,
    Failed,
    Notice,
    Ready,
    SettledChange,
    StepReport,
    StopOrder,
    ToRank,
)
from engine.session import Session
from engine.settings import Change, Settings
from engine.train import checkpoint
from engine.train.kl import next_beta
from engine.train.link import Link
from engine.train.load import load_run
from engine.train.models import fingerprint
from engine.train.step import Run, train_step
from engine.train.tensorboard import EventFiles

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs until the run is over; every way out is told to the supervisor."""
    parent = os.getppid()
    tie_to_parent(parent)
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
        text = str(error) if isinstance(error, RlhfError) else f"{type(error).__name__}: {error}"
        link.send(Failed(rank=rank, text=text, traceback=traceback.format_exc()))
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
    run = load_run(session, config, begin, link)
    loop = Loop(session, run, begin.replay)
    link.send(Ready(info=facts(run)))
    events = EventFiles(session.tensorboard, begin.from_step) if config.log.tensorboard else None
    if events is not None and not begin.from_step:
        events.hparams(config)

    while not loop.over():
        loop.obey()
        if loop.stop_ids is not None:
            break
        step = run.state.step + 1
        loop.replay(step)
        began = time.monotonic()
        metrics, samples = train_step(run, step)
        changes = loop.after(step, metrics, time.monotonic() - began)
        if events is not None:
            events.step(step, metrics, samples)
        link.send(
            StepReport(
                step=step,
                metrics=metrics,
                samples=samples,
                changes=changes,
                settings=msgspec.to_builtins(run.state.settings),
            )
        )
        if loop.save_is_due():
            loop.save()
    loop.finish()
    if events is not None:
        events.close()


class Loop:
    """What goes on at the step boundaries: commands, the KL controller, checkpoints, the end."""

    def __init__(self, session: Session, run: Run, replay: list[SettledChange]) -> None:
        self._checkpoints = session.checkpoints
        self._run = run
        self._replay = replay
        self._saved = run.state.step
        self._score, self._kl = 0.0, 0.0
        self._attempt_began = time.monotonic()
        self.stop_ids: list[str] | None = None
        """The stop commands that ended the run; None while it goes on."""

    def over(self) -> bool:
        """Whether the steps, or the hours, are used up."""
        return self._end_reason() is not None

    def _end_reason(self) -> str | None:
        train, state = self._run.config.train, self._run.state
        if state.step >= train.steps:
            return "finished"
        if train.max_hours is not None and state.seconds >= train.max_hours * 3600:
            return "max_hours"
        return None

    def obey(self) -> None:
        """Carries out what the operators asked for since the last boundary."""
        self._take(self._run.link.orders())

    def _take(self, orders: list[ToRank]) -> None:
        for order in orders:
            match order:
                case StopOrder():
                    self.stop_ids = [*(self.stop_ids or []), order.id]
                case _:
                    raise LinkError(f"did not expect {order}")

    def replay(self, step: int) -> None:
        """Applies again what had been changed at this step before a crash."""
        for change in self._replay:
            if change.step == step:
                self._set(**{change.key: change.new})

    def after(self, step: int, metrics: dict[str, float], seconds: float) -> list[Change]:
        """Closes a step: counts it, and lets the KL controller set the next one's beta."""
        state = self._run.state
        state.step, state.seconds = step, state.seconds + seconds
        self._score, self._kl = metrics["objective/scores"], metrics["objective/kl"]
        old = state.settings.beta
        new = next_beta(state.settings, self._kl, self._run.config.rollout.batch_size)
        if new == old:
            return []
        self._set(beta=new)
        return [Change(key="beta", old=old, new=new)]

    def _set(self, **values: object) -> None:
        state = self._run.state
        merged = msgspec.to_builtins(state.settings) | values
        state.settings = msgspec.convert(merged, Settings, strict=False)

    def save_is_due(self) -> bool:
        """At every `save_every` steps."""
        every = self._run.state.settings.save_every
        return bool(every) and self._run.state.step % every == 0

    def save(self) -> str | None:
        """Writes a checkpoint; what prevented it is a notice, and returned, not the run's end."""
        run, state = self._run, self._run.state
        if self._saved == state.step:
            return None
        run.link.phase(state.step, "checkpoint")
        try:
            folder, size = checkpoint.write(
                self._checkpoints,
                state,
                run.policy,
                run.tokenizer,
                run.optimiser,
                score=self._score,
                kl=self._kl,
            )
        except CheckpointError as error:
            run.link.send(Notice(step=state.step, rule="checkpoint", text=str(error)))
            return str(error)
        removable = self._removable()
        run.link.send(
            CheckpointWritten(
                step=state.step, size=size, score=self._score, kl=self._kl, removed=removable
            )
        )
        self._take(run.link.confirm(state.step))
        checkpoint.complete(folder)
        run.link.send(CheckpointComplete(step=state.step))
        for step in removable:
            checkpoint.remove(checkpoint.folder_of(self._checkpoints, step))
        self._saved = state.step
        return None

    def _removable(self) -> list[int]:
        """Older checkpoints that make way for the one just written."""
        train, now = self._run.config.train, self._run.state.step
        found = checkpoint.completed(self._checkpoints)
        scores = {s: checkpoint.read_score(f) for s, f in found.items() if s < now}
        scores[now] = self._score
        return checkpoint.to_remove(scores, train.keep_last, train.keep_best)

    def finish(self) -> None:
        """Saves, checks that the reference was left alone, and says how it ended."""
        run = self._run
        if problem := self.save():
            raise CheckpointError(problem)
        if fingerprint(run.reference) != run.state.reference:
            raise RlhfError("the reference model's weights changed during the run; they must not")
        reason = "stopped" if self.stop_ids is not None else self._end_reason() or "finished"
        for command_id in filter(None, self.stop_ids or []):
            run.link.send(Applied(id=command_id, step=run.state.step + 1))
        run.link.send(Ended(step=run.state.step, reason=reason))


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
