"""What happens between two steps: commands, the KL controller, and the end of the run.

Settings change only here. So they are constant within a step, and all ranks change them between the
same two steps.
"""

import logging
import os
import time
from typing import Any, assert_never

import msgspec

from engine.config.deadline import deadline
from engine.config.settings import SettingChange, settings_of
from engine.errors import CheckpointError, CommandRejectedError, LinkError, RlhfError
from engine.examined import examined
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
    REWARD_FAILED,
    Adjusted,
    Applied,
    Begin,
    Ended,
    Notice,
    Paused,
    RankCommand,
    Rejected,
    ToRank,
    Unpaused,
)
from engine.session.folder import SessionFolder
from engine.train.checkpointing import CheckpointManager
from engine.train.link import Link
from engine.train.live_settings import LiveSettings
from engine.train.models.language_model import fingerprint
from engine.train.models.reference_update import mix_into_reference
from engine.train.reports.probe import answer_probe
from engine.train.reports.trackers import FINISH_SECONDS
from engine.train.rewards.recovery import Recovery
from engine.train.rewards.source import RewardCallError
from engine.train.run import Run

log = logging.getLogger("engine")

PAUSE_POLL_INTERVAL = 0.5
"""Seconds between polls for commands while paused; far below the time-out of a collective."""
PAUSE_REPORT_INTERVAL = 2.0
"""Seconds between `paused` messages, by which the supervisor knows that the ranks are alive."""


class BoundaryBroadcast(msgspec.Struct):
    """What rank 0 broadcasts to the other ranks between two steps."""

    commands: list[ToRank]
    seconds: float
    """Training time so far. Equal on all ranks, so `train.max_hours` ends them at the same step."""
    beta: float
    reached: bool
    """Whether `train.stop_at` is met. Ranks may differ, in times or in a sum's last bit."""
    early: str = ""
    """Why the ranks save and end now although steps are left, as in :class:`Ended`; "" if not."""
    recovered: bool = False
    """Whether the reward source that the run is paused for works again."""


def update_reference(run: Run) -> None:
    """Updates the reference if `kl.reference_update` has it due before the next step.

    Not right after the last one: its checkpoint and its evaluation have the reference of that step.
    """
    state, update = run.state, run.config.kl.reference_update
    due = update.every and state.step and state.step % update.every == 0
    if due and state.reference_updated != state.step:
        mix_into_reference(run.policy, run.reference, update.mix)
        state.reference, state.reference_updated = fingerprint(run.reference), state.step


class Boundary:
    """The boundary between steps. All ranks call its methods together.

    Call :meth:`before_step`, run the step if it returns True, call :meth:`after_step`, and repeat;
    then call :meth:`finish`. Call :meth:`close` in either case.
    """

    def __init__(self, session: SessionFolder, run: Run, begin: Begin, link: Link) -> None:
        self._run = run
        self._link = link
        self._settings = LiveSettings(run, begin)
        self.checkpoints = CheckpointManager(session.checkpoints, run, link, begin)
        """Saves the run's checkpoints."""
        self._paused = begin.paused
        self._recovers = False
        """Whether the pause ends by itself. A command to pause makes it one that does not."""
        self._recovery: Recovery | None = None
        self._stop_ids: list[str] = []
        self._ended = False
        self._reached = False
        self._early = ""
        self._from_step = begin.from_step
        self._deadline = deadline(run.config.train, os.environ)
        self._longest_step = 0.0
        self._pause_error: RewardCallError | None = None

    def before_step(self) -> bool:
        """Executes the commands received since the last step; blocks while the run is paused.

        Returns:
            Whether another step follows.
        """
        self.checkpoints.poll()
        self._settings.repeat(self._run.state.step + 1)
        received = self._next_broadcast(0.0)
        self._begin_pause()
        self._execute_received(received)
        reported = time.monotonic()
        while self._paused and not self._stop_ids and not self._early:
            if time.monotonic() - reported > PAUSE_REPORT_INTERVAL:
                reported = time.monotonic()
                self._link.phase(self._run.state.step, "paused")
            self._execute_received(self._next_broadcast(PAUSE_POLL_INTERVAL))
        follows = not self._stop_ids and self._end_reason() is None
        if follows:
            update_reference(self._run)
        return follows

    def next_settings(self) -> dict[str, Any]:
        """The settings of the next step, with what a resume repeats before it."""
        settings: dict[str, Any] = msgspec.to_builtins(
            self._settings.of_step(self._run.state.step + 1)
        )
        return settings

    def pause_before_step(self, error: RewardCallError) -> None:
        """Has :meth:`before_step` pause before a step whose reward could not be computed.

        It then executes commands, like in any pause, and returns when the step is to be repeated.
        If the error says that the source may recover, it is tried from time to time, and the pause
        ends when it works again. After the last step there is no pause, as nothing is left to
        repeat, but a notice. Call it on all ranks; the error is the same on all of them.
        """
        self._pause_error = error

    def _begin_pause(self) -> None:
        """Carries out :meth:`pause_before_step`. Call it when the ranks agree on the end."""
        error, self._pause_error = self._pause_error, None
        if error is None:
            return
        step, reason = self._run.state.step, str(error)
        log.error("%s", "\n".join(filter(None, [reason, error.trace])))
        if self._end_reason() is not None:
            self._link.send(Notice(step=step, rule=REWARD_FAILED, text=reason))
            return
        # An attempt that begins paused computes rewards before its first boundary.
        already = self._paused and not self._recovers
        self._set_pause(True)
        self._recovers = error.recovers and not already
        if self._recovers and error.works_again is not None:
            self._recovery = Recovery(error.works_again)
        if self._recovers:
            reason += "; the run resumes by itself when that works again"
        self._link.send(
            Paused(
                step=step,
                rule=REWARD_FAILED,
                reason=reason,
                traceback=error.trace,
                recovers=self._recovers,
            )
        )

    def _set_pause(self, paused: bool) -> None:
        """Pauses or unpauses; in either case no source is waited for any more."""
        self._paused, self._recovers = paused, False
        if self._recovery is not None:
            self._recovery.cancel()
            self._recovery = None

    def _end_reason(self) -> str | None:
        train, state = self._run.config.train, self._run.state
        if state.step >= train.steps:
            return "finished"
        if self._reached:
            return "stop_at"
        if train.max_hours is not None and state.seconds >= train.max_hours * 3600:
            return "max_hours"
        return self._early or None

    def _early_end(self) -> str:
        """Why the run has to save and end, decided by rank 0 before a step; "" if it does not.

        `deadline`: the longest step and the longest save do not fit any more. `preempted`: another
        machine of the run is about to be taken away; `leaving`: and the others can continue.
        `joining`: another machine wants to take part, and the last step is being saved.
        """
        needed = self._longest_step + self.checkpoints.seconds_to_save()
        needed += self._run.config.train.deadline_margin
        if self._run.config.log.trackers:
            needed += FINISH_SECONDS  # the end of the run may wait as long for them
        if self._deadline is not None and self._deadline - time.time() < needed:
            return "deadline"
        if self._run.ranks.is_machine_leaving():
            return "preempted" if self._run.config.launch.min_nodes is None else "leaving"
        state = self._run.state
        saved = state.step > self._from_step and self.checkpoints.has_begun_to_save(state.step)
        return "joining" if saved and self._run.ranks.is_machine_waiting() else ""

    def _has_reached_aim(self, metrics: dict[str, float]) -> bool:
        """Whether a step's metrics meet `train.stop_at`."""
        aim = self._run.config.train.stop_at
        return aim is not None and aim.metric in metrics and aim.reached(metrics[aim.metric])

    # -- commands -----------------------------------------------------------------------------

    def _execute_received(self, received: BoundaryBroadcast) -> None:
        """Executes rank 0's new commands, and ends a pause for a source that works again.

        The commands come first: a person's pause in the same moment stays.
        """
        self._execute(received.commands)
        if received.recovered and self._recovers:
            self._set_pause(False)
            text = "the reward source works again; the run resumes"
            log.info("%s", text)
            self._link.send(Unpaused(step=self._run.state.step, rule=REWARD_FAILED, text=text))

    def _next_broadcast(self, wait: float) -> BoundaryBroadcast:
        """Rank 0's new commands, on every rank.

        Training time, beta and the verdicts on `train.stop_at` and an early end are broadcast with
        them: rank 0 measured or computed them, and they must be bitwise equal on all ranks. While
        paused this runs every :data:`PAUSE_POLL_INTERVAL`, so that no rank waits in a collective
        until it times out.
        """
        run, data = self._run, b""
        if run.ranks.is_lead:
            commands = self._link.commands(wait)
            data = msgspec.msgpack.encode(
                BoundaryBroadcast(
                    commands=commands,
                    seconds=run.state.seconds,
                    beta=run.config.kl.beta,
                    reached=self._reached,
                    recovered=self._recovery is not None and self._recovery.recovered,
                    early=self._early_end(),
                )
            )
        received = msgspec.msgpack.decode(
            run.ranks.broadcast_bytes(data), type=examined(BoundaryBroadcast)
        )
        run.state.seconds, self._reached = received.seconds, received.reached
        self._early = received.early
        self._settings.set({"beta": received.beta})
        return received

    def _execute(self, commands: list[ToRank]) -> None:
        for message in commands:
            if not isinstance(message, RankCommand):
                raise LinkError(f"expected a command, got {message}")
            if self._ended:
                self._link.send(Rejected(id=message.id, reason="the run has ended"))
                continue
            try:
                applied = self._carry_out(message.id, message.command)
            except (CommandRejectedError, CheckpointError) as error:
                self._link.send(Rejected(id=message.id, reason=str(error)))
            else:
                if applied is not None:
                    self._link.send(applied)

    def _carry_out(self, command_id: str, command: BoundaryCommand) -> Applied | None:
        """Executes a command; returns its reply, or None for `stop`: :meth:`finish` sends that.

        Raises:
            CommandRejectedError: it cannot be executed now.
            CheckpointError: the checkpoint it asks for could not be written.
        """
        step, changes, result = self._run.state.step + 1, [], {}
        match command:
            case Pause():
                self._set_pause(True)
            case Unpause():
                self._set_pause(False)
            case Stop():
                self._stop_ids.append(command_id)
                return None
            case Checkpoint():
                self._save_checkpoint()
            case SetBeta() | SetKLController() | SetSetting():
                values = command.new_values(settings_of(self._run.config))
                changes = self._settings.change(values)
            case Undo():
                changes = self._settings.undo()
            case Probe(text=text):
                result = answer_probe(self._run, text)
            case _:
                assert_never(command)
        return Applied(id=command_id, step=step, changes=changes, result=result)

    def _save_checkpoint(self) -> None:
        if not self._run.state.step:
            raise CommandRejectedError("there is nothing to save before the first step is done")
        if problem := self.checkpoints.save():
            raise CheckpointError(problem)
        if self._run.ahead is not None:
            # What follows a checkpoint is generated with its weights, here as after a resume.
            self._run.ahead.drop()

    def adjust(self, change: SettingChange, text: str) -> None:
        """Changes a setting for the next step without a command, and tells the operator why.

        It is recorded like the command `set`, so a resume repeats it at the same step and `undo`
        reverts it.
        """
        changes = self._settings.change({change.key: change.new})
        log.warning("%s", text)
        self._link.send(
            Adjusted(step=self._run.state.step + 1, changes=changes, rule="memory", text=text)
        )

    # -- after a step -------------------------------------------------------------------------

    def after_step(
        self, step: int, metrics: dict[str, float], seconds: float
    ) -> list[SettingChange]:
        """Counts a finished step, and lets the KL controller set the next step's beta.

        Args:
            step: the finished step.
            metrics: its metrics; gains `time/checkpoint`, the seconds that saving has taken since
                the step before.
            seconds: the step's duration.

        Returns:
            The controller's change of beta, if any.
        """
        state, config, kl = self._run.state, self._run.config, metrics["objective/kl"]
        state.step, state.seconds = step, state.seconds + seconds
        self._longest_step = max(self._longest_step, seconds)
        metrics["time/checkpoint"] = self.checkpoints.step_done(metrics)
        self._reached = self._has_reached_aim(metrics)
        beta = next_beta(config.kl, kl, config.rollout.batch_size)
        if config.kl.beta == 0 and beta > 0:
            text = f"no factor changes a beta of 0: it begins again at beta_min, {beta:g}"
            self._link.send(Notice(step=step, rule="controller", text=text))
        changes = [] if beta == config.kl.beta else self._settings.set({"beta": beta})
        self._run.settings_after_step = settings_of(self._run.config)
        return changes

    def close(self) -> None:
        """Lets a running save finish; for a run that ends with an error, too."""
        self._set_pause(self._paused)
        self.checkpoints.close()

    def finish(self) -> str:
        """Saves the last step, checks the reference's weights, and reports the end of the run.

        Returns:
            The reason of the end, as in :class:`Ended`.

        Raises:
            CheckpointError: the checkpoint could not be written.
            RlhfError: the reference's weights have changed, which is a bug.
        """
        run, self._ended = self._run, True
        if problem := self.checkpoints.save():
            raise CheckpointError(problem)
        if fingerprint(run.reference) != run.state.reference:
            raise RlhfError("the reference model's weights changed during the run; they must not")
        for command_id in self._stop_ids:
            self._link.send(Applied(id=command_id, step=run.state.step + 1))
        reason = "stopped" if self._stop_ids else self._end_reason() or "finished"
        self._link.send(Ended(step=run.state.step, reason=reason))
        return reason
