"""What goes on between two steps: orders, the KL controller, the end.

Settings change here and nowhere else, so that a step is homogeneous and every rank obeys at the
same place.
"""

import logging
import time
from typing import Any, assert_never

import msgspec

from engine.config.settings import SettingChange, Settings
from engine.errors import CheckpointError, CommandRejectedError, LinkError, RlhfError
from engine.kl import next_beta
from engine.protocol.commands import (
    BoundaryCommand,
    Checkpoint,
    Pause,
    Probe,
    SetBeta,
    SetKLController,
    SetSetting,
    Stop,
    Undo,
    Unpause,
)
from engine.protocol.rank_messages import (
    Applied,
    Begin,
    Ended,
    RankCommand,
    Rejected,
    ReplayedChange,
    ToRank,
)
from engine.session.folder import Session
from engine.train.checkpointing import CheckpointManager
from engine.train.link import Link
from engine.train.models.language_model import fingerprint
from engine.train.reports.probe import answer_probe
from engine.train.run import Run, max_response_tokens

log = logging.getLogger("engine")

PAUSE_POLL_INTERVAL = 0.5
"""Seconds between looks at the orders while paused: well within any collective's time-out."""
PAUSE_REPORT_INTERVAL = 2.0
"""Seconds between signs of life while paused."""


class BoundaryBroadcast(msgspec.Struct):
    """What rank 0 says to the others between two steps."""

    orders: list[ToRank]
    seconds: float
    """Of training so far: `train.max_hours` ends all ranks at the same step."""
    beta: float


class Boundary:
    """The state that lives between steps."""

    def __init__(self, session: Session, run: Run, begin: Begin, link: Link) -> None:
        self._run = run
        self._link = link
        self._replay = begin.replay
        self._undoable = list(begin.undoable)
        self.keeper = CheckpointManager(session.checkpoints, run, link, begin)
        """Of the checkpoints."""
        self._paused = begin.paused
        self._stops: list[str] = []
        self._over = False

    def more(self) -> bool:
        """Obeys what was ordered, holds while paused, and says whether another step follows."""
        self.keeper.poll()
        step = self._run.state.step + 1
        for settled in self._replay:
            if settled.step == step:
                self._repeat(settled)
        self._obey(self._agree())
        held = time.monotonic()
        while self._paused and not self._stops:
            if time.monotonic() - held > PAUSE_REPORT_INTERVAL:
                held = time.monotonic()
                self._link.phase(self._run.state.step, "paused")
            self._obey(self._agree(wait=PAUSE_POLL_INTERVAL))
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
        if run.ranks.is_lead:
            heard = self._link.orders(wait)
            own = msgspec.msgpack.encode(
                BoundaryBroadcast(
                    orders=heard, seconds=run.state.seconds, beta=run.state.settings.beta
                )
            )
        word = msgspec.msgpack.decode(run.ranks.broadcast_bytes(own), type=BoundaryBroadcast)
        run.state.seconds = word.seconds
        self._set({"beta": word.beta})
        return word.orders

    def _obey(self, orders: list[ToRank]) -> None:
        for order in orders:
            if not isinstance(order, RankCommand):
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

    def _carry_out(self, order_id: str, command: BoundaryCommand) -> Applied | None:
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
            case SetBeta() | SetKLController() | SetSetting():
                changes = self._steer(command.new_values(self._run.state.settings))
                self._undoable.append(changes)
            case Undo():
                changes = self._undo()
            case Probe(text=text):
                result = answer_probe(self._run, text)
            case _:
                assert_never(command)
        return Applied(id=order_id, step=step, changes=changes, result=result)

    def _checkpoint_now(self) -> None:
        if not self._run.state.step:
            raise CommandRejectedError("nothing to save before the first step is done")
        if problem := self.keeper.save():
            raise CheckpointError(problem)

    def _undo(self) -> list[SettingChange]:
        if not self._undoable:
            raise CommandRejectedError("there is no change to take back")
        return self._steer({c.key: c.old for c in self._undoable.pop()})

    def _repeat(self, settled: ReplayedChange) -> None:
        """A change from before a crash, once more; it can be taken back like any other."""
        changes = self._change({c.key: c.new for c in settled.changes})
        if settled.command == Undo.name():
            del self._undoable[-1:]
        elif changes:
            self._undoable.append(changes)

    def _steer(self, values: dict[str, Any]) -> list[SettingChange]:
        """An operator's change; what it contradicts of the history still to be repeated is over."""
        room = max_response_tokens(self._run)
        if room is not None and values.get("max_new_tokens", 0) > room:
            raise CommandRejectedError(
                f"max_new_tokens may be {room} at most: there the model ends, after the longest "
                f"prompt of {self._run.prompts.longest} tokens"
            )
        self._replay = [
            msgspec.structs.replace(s, changes=[c for c in s.changes if c.key not in values])
            for s in self._replay
        ]
        return self._change(values)

    def _change(self, values: dict[str, Any]) -> list[SettingChange]:
        before = msgspec.structs.asdict(self._run.state.settings)
        self._set(values)
        return [SettingChange(key=k, old=before[k], new=v) for k, v in values.items()]

    def _set(self, values: dict[str, Any]) -> None:
        state = self._run.state
        merged = msgspec.structs.asdict(state.settings) | values
        state.settings = msgspec.convert(merged, Settings, strict=False)

    # -- after a step -------------------------------------------------------------------------

    def after(self, step: int, metrics: dict[str, float], seconds: float) -> list[SettingChange]:
        """Closes a step: counts it, and lets the KL controller set the next one's beta.

        `metrics` gains `time/checkpoint`, what saving took since the step before.
        """
        state, kl = self._run.state, metrics["objective/kl"]
        state.step, state.seconds = step, state.seconds + seconds
        metrics["time/checkpoint"] = self.keeper.step_done(metrics["objective/scores"], kl)
        new = next_beta(state.settings, kl, self._run.config.rollout.batch_size)
        return [] if new == state.settings.beta else self._change({"beta": new})

    def close(self) -> None:
        """Lets a save in flight finish when a step has failed."""
        self.keeper.close()

    def finish(self) -> None:
        """Saves, checks that the reference was left alone, and says how it ended."""
        run, self._over = self._run, True
        if problem := self.keeper.save():
            raise CheckpointError(problem)
        if fingerprint(run.reference) != run.state.reference:
            raise RlhfError("the reference model's weights changed during the run; they must not")
        for order_id in self._stops:
            self._link.send(Applied(id=order_id, step=run.state.step + 1))
        reason = "stopped" if self._stops else self._end_reason() or "finished"
        self._link.send(Ended(step=run.state.step, reason=reason))
