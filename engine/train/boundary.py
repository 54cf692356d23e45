"""Handles what happens between two steps: commands, the KL controller and the end of the run.

Settings change only here, so they are constant within a step and all ranks change them between the
same two steps.
"""

import logging
import time
from typing import Any, assert_never

import msgspec

from engine.config.settings import SettingChange, settings_of
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
    LAST_SAVE_WAITS,
    REWARD_FAILED,
    ROOM,
    WAIT_FOR,
    Adjusted,
    Applied,
    Begin,
    Ended,
    Notice,
    Paused,
    Preempted,
    RankCommand,
    Rejected,
    ToRank,
    Unpaused,
)
from engine.session.folder import SessionFolder
from engine.train.checkpoints.folder import lacks_room
from engine.train.checkpoints.manager import CheckpointManager
from engine.train.end_criteria import EndCriteria
from engine.train.link import Link
from engine.train.live_settings import LiveSettings
from engine.train.models.language_model import fingerprint
from engine.train.models.reference_update import mix_into_reference
from engine.train.reports.probe import answer_probe
from engine.train.rewards.recovery import Recovery
from engine.train.rewards.source import RewardCallError
from engine.train.run import Run

log = logging.getLogger("engine")

PAUSE_POLL_INTERVAL = 0.5
"""Seconds between polls for commands while paused; far below a collective's timeout."""
SAVE_RETRY_INTERVAL = 5.0
"""Seconds between attempts to save the last step while the disk is full."""
PAUSE_REPORT_INTERVAL = 2.0
"""Seconds between `paused` messages, which tell the supervisor that the ranks are alive."""


class BoundaryBroadcast(msgspec.Struct):
    """What rank 0 broadcasts to the other ranks between two steps."""

    commands: list[ToRank]
    seconds: float
    """Training time so far. Equal on all ranks, so `train.max_hours` ends them at the same step."""
    beta: float
    reached: bool
    """Whether `train.stop_at` is met. Ranks may differ in times, or in the last bit of a sum."""
    early: str = ""
    """See :attr:`EndCriteria.early`."""
    recovered: bool = False
    """Whether the reward source that caused the pause works again."""


def update_reference(run: Run) -> None:
    """Updates the reference if `kl.reference_update` says it is due; call it before each step.

    This does not happen immediately after a step, since the step's checkpoint and evaluation use
    the reference of that step.
    """
    state, update = run.state, run.config.kl.reference_update
    due = update.every and state.step and state.step % update.every == 0
    if due and state.reference_updated != state.step:
        mix_into_reference(run.policy, run.reference, update.mix)
        state.reference, state.reference_updated = fingerprint(run.reference), state.step


class Boundary:
    """The boundary between steps. All ranks must call its methods together.

    Call :meth:`before_step`, run the step if it returns True, call :meth:`after_step`, and repeat.
    Then call :meth:`finish`. Always call :meth:`close` at the end, also after an error.
    """

    def __init__(self, session: SessionFolder, run: Run, begin: Begin, link: Link) -> None:
        self._run = run
        self._link = link
        self._settings = LiveSettings(run, begin)
        self.checkpoints = CheckpointManager(session.checkpoints, run, link, begin)
        self._paused = begin.paused
        self._recovers = False
        """Whether the pause ends when the source recovers; a pause command clears this."""
        self._recovery: Recovery | None = None
        self._stop_ids: list[str] = []
        self._ended = False
        self._end = EndCriteria(run, self.checkpoints, begin.from_step)
        self._preempted = False
        """Whether a scheduler is about to end the run, by a signal to its supervisor."""
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
        while self._paused and not self._stop_ids and not self._end.early:
            if time.monotonic() - reported > PAUSE_REPORT_INTERVAL:
                reported = time.monotonic()
                self._link.phase(self._run.state.step, "paused")
            self._execute_received(self._next_broadcast(PAUSE_POLL_INTERVAL))
        return not self._stop_ids and self._end.reason() is None

    def next_settings(self) -> dict[str, Any]:
        """Returns the settings of the next step, including changes to repeat before it."""
        settings: dict[str, Any] = msgspec.to_builtins(
            self._settings.of_step(self._run.state.step + 1)
        )
        return settings

    def pause_before_step(self, error: RewardCallError) -> None:
        """Makes :meth:`before_step` pause before a step whose reward could not be computed.

        As in any pause, :meth:`before_step` then executes commands; it returns when the step should
        be repeated. If the error says that the source may recover, the source is tried from time to
        time, and the pause ends when it works again. After the last step nothing is left to repeat,
        so there is only a notice. All ranks must call this with the same error.
        """
        self._pause_error = error

    def _begin_pause(self) -> None:
        """Starts the pause of :meth:`pause_before_step`, once the ranks agree on whether to end."""
        error, self._pause_error = self._pause_error, None
        if error is None:
            return
        step, reason = self._run.state.step, str(error)
        if self._run.ranks.is_lead:  # the error is that of all ranks
            log.error("%s", "\n".join(filter(None, [reason, error.trace])))
        if self._end.reason() is not None:
            self._link.send(Notice(step=step, rule=REWARD_FAILED, text=reason))
            return
        # An attempt that starts paused computes rewards before its first boundary.
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
        """Pauses or resumes; either way, stops waiting for a reward source."""
        self._paused, self._recovers = paused, False
        if self._recovery is not None:
            self._recovery.cancel()
            self._recovery = None

    # -- commands -----------------------------------------------------------------------------

    def _execute_received(self, received: BoundaryBroadcast) -> None:
        """Executes rank 0's new commands, then ends the pause if the reward source works again.

        Commands come first, so that a pause requested by a person at the same moment persists.
        """
        self._execute(received.commands)
        if received.recovered and self._recovers:
            self._set_pause(False)
            text = "the reward source works again; the run resumes"
            log.info("%s", text)
            self._link.send(Unpaused(step=self._run.state.step, rule=REWARD_FAILED, text=text))

    def _next_broadcast(self, wait: float) -> BoundaryBroadcast:
        """Broadcasts rank 0's new commands to every rank.

        Training time, beta, and the decisions about `train.stop_at` and an early end are broadcast
        with them, because they must be bitwise equal on all ranks. While paused this runs every
        :data:`PAUSE_POLL_INTERVAL`, so that no rank waits in a collective until it times out.
        """
        run, end = self._run, self._end

        def make() -> BoundaryBroadcast:
            return BoundaryBroadcast(
                commands=self._link.commands(wait),
                seconds=run.state.seconds,
                beta=run.config.kl.beta,
                reached=end.reached,
                recovered=self._recovery is not None and self._recovery.recovered,
                early=end.early_reason(),
            )

        received = run.ranks.broadcast(make, BoundaryBroadcast)
        run.state.seconds = received.seconds
        end.reached, end.early = received.reached, received.early
        self._settings.set({"beta": received.beta})
        return received

    def _execute(self, commands: list[ToRank]) -> None:
        for message in commands:
            if isinstance(message, Preempted):
                self._preempted = True
                continue
            if not isinstance(message, RankCommand):
                raise LinkError(f"expected a command, got {message}")
            if self._ended and not isinstance(message.command, Stop):
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
        """Executes a command; returns its reply, or None for `stop`, which :meth:`finish` answers.

        Raises:
            CommandRejectedError: the command cannot be executed now.
            CheckpointError: the requested checkpoint could not be written.
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
            case Checkpoint(keep=keep):
                self._save_checkpoint(keep=keep)
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

    def _save_checkpoint(self, *, keep: bool) -> None:
        if not self._run.state.step:
            raise CommandRejectedError("there is nothing to save before the first step is done")
        checkpoints = self.checkpoints
        if problem := checkpoints.save_and_keep() if keep else checkpoints.save():
            raise CheckpointError(problem)
        if self._run.ahead is not None:
            # Responses after a checkpoint are generated with its weights, as they are after a
            # resume.
            self._run.ahead.drop()

    def adjust(self, change: SettingChange, text: str) -> None:
        """Changes a setting for the next step without a command, and tells the operator why.

        The change is recorded like the command `set`: a resume repeats it at the same step, and
        `undo` reverts it.
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
        """Records a finished step, and lets the KL controller set the next step's beta.

        Args:
            step: the finished step.
            metrics: its metrics. `time/checkpoint` is added: the seconds spent saving since the
                previous step.
            seconds: the step's duration.

        Returns:
            The controller's change of beta, if any.
        """
        state, config, kl = self._run.state, self._run.config, metrics["objective/kl"]
        state.step, state.seconds = step, state.seconds + seconds
        metrics["time/checkpoint"] = self.checkpoints.step_done(metrics)
        self._end.step_done(metrics, seconds)
        beta = next_beta(config.kl, kl, config.rollout.batch_size)
        if config.kl.beta == 0 and beta > 0:
            text = f"no factor changes a beta of 0: it begins again at beta_min, {beta:g}"
            self._link.send(Notice(step=step, rule="controller", text=text))
        changes = [] if beta == config.kl.beta else self._settings.set({"beta": beta})
        self._run.settings_after_step = settings_of(self._run.config)
        return changes

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Records an evaluation of the finished step after :meth:`after_step`.

        Call :meth:`before_step` again: the run may have reached its aim.
        """
        self.checkpoints.evaluated(metrics)
        self._end.evaluated(metrics)

    def close(self) -> None:
        """Waits for a running save to finish; also called when the run ends with an error."""
        self._set_pause(self._paused)
        self.checkpoints.close()

    def finish(self) -> str:
        """Saves the last step, verifies the reference's weights, and reports the end of the run.

        Returns:
            Why the run ended, as in :class:`Ended`.

        Raises:
            CheckpointError: the checkpoint could not be written.
            RlhfError: the reference's weights have changed, which is a bug.
        """
        run, self._ended = self._run, True
        reason = "stopped" if self._stop_ids else self._end.reason() or "finished"
        self._save_last_step()
        if fingerprint(run.reference) != run.state.reference:
            raise RlhfError("the reference model's weights changed during the run; they must not")
        for command_id in self._stop_ids:
            self._link.send(Applied(id=command_id, step=run.state.step + 1))
        self._link.send(Ended(step=run.state.step, reason=reason))
        return reason

    def _save_last_step(self) -> None:
        """Saves the last step. If there is no room on the disk, waits for it, so no step is lost.

        Raises:
            CheckpointError: it could not be written for another reason, or there is no time to wait
                because the run must end before its last step or a scheduler ends it.
        """
        waits = False
        while problem := self.checkpoints.save():
            if not lacks_room(problem):
                raise CheckpointError(problem)
            step = self._run.state.step
            if self._has_no_time():
                raise CheckpointError(
                    f"{problem}; step {step}, the last one, is not saved: resume the run once "
                    "there is room, which repeats the steps since the last checkpoint"
                )
            if not waits:
                text = f"step {step}, the last one, is not saved yet, and the run waits: {problem}"
                log.error("%s", text)
                self._link.send(Notice(step=step, rule=LAST_SAVE_WAITS, text=text))
            waits = True
            self._wait_for_room()

    def _wait_for_room(self) -> None:
        """Waits until it is time for another attempt to save; only a stop is accepted meanwhile."""
        for _ in range(round(SAVE_RETRY_INTERVAL / PAUSE_POLL_INTERVAL)):
            self._link.phase(self._run.state.step, f"{WAIT_FOR}{ROOM}")
            self._execute(self._next_broadcast(PAUSE_POLL_INTERVAL).commands)
            if self._has_no_time():
                return

    def _has_no_time(self) -> bool:
        """Whether the run must end now, also without the checkpoint of its last step."""
        return self._preempted or self._end.has_no_time
