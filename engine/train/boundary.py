"""What goes on between two steps: orders, the KL controller, checkpoints, the end.

Settings change here and nowhere else, so that a step is homogeneous and every rank obeys at the
same place.
"""

import logging
import math
import time
from typing import Any

import msgspec

from engine.commands import (
    AnyCommand,
    Beta,
    Checkpoint,
    Control,
    Pause,
    Probe,
    Set,
    Stop,
    Undo,
    Unpause,
    new_values,
)
from engine.errors import CheckpointError, CommandRejectedError, LinkError, RlhfError
from engine.kl import next_beta
from engine.protocol import (
    Applied,
    Begin,
    CheckpointComplete,
    CheckpointWritten,
    Ended,
    Notice,
    Order,
    Rejected,
    Settled,
    ToRank,
)
from engine.session import Session
from engine.settings import Change, Settings
from engine.train import checkpoint
from engine.train.link import Link
from engine.train.models import fingerprint
from engine.train.probe import answer_probe
from engine.train.saver import Outcome, Saver
from engine.train.step import Run

log = logging.getLogger("engine")

HOLD_INTERVAL = 0.5
"""Seconds between looks at the orders while paused: well within any collective's time-out."""
HOLD_REPORT = 2.0
"""Seconds between signs of life while paused, or while a checkpoint is waited for."""
CLOSE_TIMEOUT = 30.0
"""Seconds a save in flight is given when the run fails."""


class Word(msgspec.Struct):
    """What rank 0 says to the others between two steps."""

    orders: list[ToRank]
    seconds: float
    """Of training so far: `train.max_hours` ends all ranks at the same step."""
    beta: float


class Boundary:
    """The state that lives between steps."""

    def __init__(self, session: Session, run: Run, begin: Begin, link: Link) -> None:
        self._checkpoints = session.checkpoints
        self._run = run
        self._link = link
        self._replay = begin.replay
        self._undoable = list(begin.undoable)
        self._saver = Saver(session.checkpoints, run.team.checkpoint_group, conclude=self._conclude)
        self._saved = begin.from_step
        """The step whose checkpoint was begun last."""
        self._paused = begin.paused
        self._stops: list[str] = []
        self._over = False
        self._score = self._kl = math.nan
        self._saving = 0.0

    def more(self) -> bool:
        """Obeys what was ordered, holds while paused, and says whether another step follows."""
        self._saver.poll()  # what must not happen in saving is raised here
        step = self._run.state.step + 1
        for settled in self._replay:
            if settled.step == step:
                self._repeat(settled)
        self._obey(self._agree())
        held = time.monotonic()
        while self._paused and not self._stops:
            if time.monotonic() - held > HOLD_REPORT:
                held = time.monotonic()
                self._link.phase(self._run.state.step, "paused")
            self._obey(self._agree(wait=HOLD_INTERVAL))
        return not self._stops and self._end_reason() is None

    def _end_reason(self) -> str | None:
        train, state = self._run.config.train, self._run.state
        if state.step >= train.steps:
            return "finished"
        if train.max_hours is not None and state.seconds >= train.max_hours * 3600:
            return "max_hours"
        return None

    # -- orders -------------------------------------------------------------------------------

    def _agree(self, wait: float = 0.0) -> list[ToRank]:
        """Rank 0's orders on every rank, at the same place in all of them.

        While paused this comes every :data:`HOLD_INTERVAL`, so that no rank ever waits in a
        collective for as long as it may take. What rank 0 measured or computed and all must agree
        on to the last bit goes with it.
        """
        run, own = self._run, b""
        if run.team.lead:
            heard = self._link.orders(wait)
            own = msgspec.msgpack.encode(
                Word(orders=heard, seconds=run.state.seconds, beta=run.state.settings.beta)
            )
        word = msgspec.msgpack.decode(run.team.tell(own), type=Word)
        run.state.seconds = word.seconds
        self._set({"beta": word.beta})
        return word.orders

    def _obey(self, orders: list[ToRank]) -> None:
        for order in orders:
            if not isinstance(order, Order):
                raise LinkError(f"did not expect {order}")
            if self._over:
                self._link.send(Rejected(id=order.id, reason="the run has ended"))
                continue
            try:
                done = self._carry_out(order.id, order.command)
            except (CommandRejectedError, CheckpointError) as error:
                self._link.send(Rejected(id=order.id, reason=str(error)))
            else:
                if done is not None:
                    self._link.send(done)

    def _carry_out(self, order_id: str, command: AnyCommand) -> Applied | None:
        """One order; what was done, or None where that is told later."""
        step, changes, result = self._run.state.step + 1, [], {}
        match command:
            case Pause():
                self._paused = True
            case Unpause():
                self._paused = False
            case Stop():
                self._stops.append(order_id)
                return None
            case Checkpoint():
                self._checkpoint_now()
            case Beta() | Control() | Set():
                changes = self._steer(new_values(command, self._run.state.settings))
                self._undoable.append(changes)
            case Undo():
                changes = self._undo()
            case Probe(text=text):
                result = answer_probe(self._run, text)
            case _:
                raise CommandRejectedError(f"{command} is not for a rank")
        return Applied(id=order_id, step=step, changes=changes, result=result)

    def _checkpoint_now(self) -> None:
        if not self._run.state.step:
            raise CommandRejectedError("nothing to save before the first step is done")
        if problem := self.save():
            raise CheckpointError(problem)

    def _undo(self) -> list[Change]:
        if not self._undoable:
            raise CommandRejectedError("there is no change to take back")
        return self._steer({c.key: c.old for c in self._undoable.pop()})

    def _repeat(self, settled: Settled) -> None:
        """A change from before a crash, once more; it can be taken back like any other."""
        changes = self._change({c.key: c.new for c in settled.changes})
        if settled.command == "undo":
            del self._undoable[-1:]
        elif changes:
            self._undoable.append(changes)

    def _steer(self, values: dict[str, Any]) -> list[Change]:
        """An operator's change; what it contradicts of the history still to be repeated is over."""
        self._replay = [
            msgspec.structs.replace(s, changes=[c for c in s.changes if c.key not in values])
            for s in self._replay
        ]
        return self._change(values)

    def _change(self, values: dict[str, Any]) -> list[Change]:
        before = msgspec.structs.asdict(self._run.state.settings)
        self._set(values)
        return [Change(key=k, old=before[k], new=v) for k, v in values.items()]

    def _set(self, values: dict[str, Any]) -> None:
        state = self._run.state
        merged = msgspec.structs.asdict(state.settings) | values
        state.settings = msgspec.convert(merged, Settings, strict=False)

    # -- after a step -------------------------------------------------------------------------

    def after(self, step: int, metrics: dict[str, float], seconds: float) -> list[Change]:
        """Closes a step: counts it, and lets the KL controller set the next one's beta.

        `metrics` gains `time/checkpoint`, what saving took since the step before.
        """
        state = self._run.state
        state.step, state.seconds = step, state.seconds + seconds
        metrics["time/checkpoint"], self._saving = self._saving, 0.0
        self._score, self._kl = metrics["objective/scores"], metrics["objective/kl"]
        new = next_beta(state.settings, self._kl, self._run.config.rollout.batch_size)
        return [] if new == state.settings.beta else self._change({"beta": new})

    def save_if_due(self) -> None:
        """At every `save_every` steps a save begins; a failure is a notice, the run goes on."""
        every = self._run.state.settings.save_every
        if every and self._run.state.step % every == 0:
            self._begin_save()

    def save(self) -> str | None:
        """A whole checkpoint of the last step, waited for; returns what prevented it."""
        step = self._run.state.step
        if self._saved == step and self._wait_for_save() is None:
            return None
        self._begin_save()
        return self._wait_for_save()

    def _begin_save(self) -> None:
        """Copies what is saved; the writing goes on beside the next steps."""
        run, state = self._run, self._run.state
        self._wait_for_save()  # the one before
        self._compare_ranks()
        self._link.phase(state.step, "checkpoint")
        began = time.monotonic()
        self._saver.begin(
            state, run.policy, run.tokenizer, run.optimiser, score=self._score, kl=self._kl
        )
        self._saved = state.step
        self._saving += time.monotonic() - began

    def _compare_ranks(self) -> None:
        """All ranks must be at one place with one mind; what is saved would be one rank's.

        Raises:
            RlhfError: they obeyed differently, which must never happen.
        """
        team, state = self._run.team, self._run.state
        if team.size == 1:
            return
        mind = (state.step, state.episodes, state.sampling_seed, state.settings)
        if len(set(team.collect(msgspec.msgpack.encode(mind)))) > 1:
            raise RlhfError(f"the ranks have come apart by step {state.step}; resume the run")
        # Whole on each rank, the weights agree to the last bit where the processors are alike.
        weights = fingerprint(self._run.policy) if self._run.strategy == "ddp" else ""
        if len(set(team.collect(weights.encode()))) > 1:
            text = "look here: the ranks' weights are no longer the same to the last bit"
            self._link.send(Notice(step=state.step, rule="ranks", text=text))

    def _wait_for_save(self) -> str | None:
        """Until no save is in flight; what prevented the last one."""
        began = time.monotonic()
        while self._saver.busy:
            self._link.phase(self._run.state.step, "checkpoint")
            self._saver.wait(HOLD_REPORT)
        self._saving += time.monotonic() - began
        outcome = self._saver.wait()
        return str(outcome) if isinstance(outcome, CheckpointError) else None

    def _conclude(self, step: int, outcome: Outcome) -> None:
        """Called beside the training, when a checkpoint is in its place or could not be written.

        At once, not at the next boundary: a step can take minutes, and a checkpoint that is on disk
        should serve whoever must go on after a crash in it.
        """
        if isinstance(outcome, CheckpointError):
            self._link.send(Notice(step=step, rule="checkpoint", text=str(outcome)))
            return
        removable = self._removable(step, outcome.score)
        self._link.send(
            CheckpointWritten(
                step=step, size=outcome.size, score=outcome.score, kl=outcome.kl, removed=removable
            )
        )
        self._link.confirm(step)
        checkpoint.complete(outcome.folder)
        self._link.send(CheckpointComplete(step=step))
        for other in removable:
            checkpoint.remove(checkpoint.folder_of(self._checkpoints, other))
        log.info(
            "checkpoint of step %d: %.1f MB in %.1f s", step, outcome.size / 1e6, outcome.seconds
        )

    def _removable(self, now: int, score: float) -> list[int]:
        """Older checkpoints that make way for the one just written."""
        train = self._run.config.train
        found = checkpoint.completed(self._checkpoints)
        scores = {s: checkpoint.read_score(f) for s, f in found.items() if s < now}
        scores[now] = score
        return checkpoint.to_remove(scores, train.keep_last, train.keep_best)

    def close(self) -> None:
        """Lets a save in flight finish when a step has failed: a resume can go on from it."""
        self._saver.close(CLOSE_TIMEOUT)

    def finish(self) -> None:
        """Saves, checks that the reference was left alone, and says how it ended."""
        run, self._over = self._run, True
        if problem := self.save():
            raise CheckpointError(problem)
        if fingerprint(run.reference) != run.state.reference:
            raise RlhfError("the reference model's weights changed during the run; they must not")
        for order_id in self._stops:
            self._link.send(Applied(id=order_id, step=run.state.step + 1))
        reason = "stopped" if self._stops else self._end_reason() or "finished"
        self._link.send(Ended(step=run.state.step, reason=reason))
