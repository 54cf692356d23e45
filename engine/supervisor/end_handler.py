"""Decides what follows the end of an attempt: another one, or the end of the session."""

import contextlib
import logging
import sqlite3

import msgspec

from engine.config.schema import RunConfig
from engine.errors import SessionError
from engine.journal.writer import JournalWriter
from engine.launch.start_checkpoints import (
    all_lost,
    checkpoint_steps,
    earlier_checkpoint,
    last_checkpoint,
    timeline_checkpoints,
)
from engine.launch.start_options import StartOptions
from engine.log_lines import NOTICED
from engine.protocol.rank_messages import RESTART_REASONS, Adjusted, Failed
from engine.session.folder import SessionFolder
from engine.session.states import State
from engine.supervisor.adjustment import record_adjustment
from engine.supervisor.commands.pending_commands import PendingCommands
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.state import SupervisorState

log = logging.getLogger("engine")

MOVED = (
    "the folder {} was moved, deleted or replaced while its engine ran; resume the session where "
    "its folder is now"
)
"""Why a run ended, with the path at which its folder was."""
UNREADABLE = "the checkpoints cannot be read: {}"


class EndHandler:
    """Handles the end of an attempt: restarts the ranks, or sets the session's final state."""

    def __init__(
        self,
        state: SupervisorState,
        session: SessionFolder,
        config: RunConfig,
        *,
        journal: JournalWriter,
        publisher: EventPublisher,
        pending: PendingCommands,
    ) -> None:
        """Stores the other parts of the supervisor.

        Args:
            state: shared by all parts.
            session: holds the checkpoints from which ranks start again.
            config: as the run was started.
            journal: records errors and the exit code.
            publisher: publishes states and notices.
            pending: the commands whose failures are counted.
        """
        self._state = state
        self._session = session
        self._config = config
        self._journal = journal
        self._publisher = publisher
        self._pending = pending
        self._restarts = 0

    def handle(self, status: int) -> int:
        """Sets the session's state after the ranks' end; returns the exit code of this attempt.

        Raises:
            SessionError: the journal cannot be written; says how the attempt ended.
        """
        try:
            return self._handle(status)
        except sqlite3.Error as error:
            raise SessionError(self._unrecorded_end(status, error)) from error
        except OSError as error:
            return self._fail(f"{self._cause(status).text}; {UNREADABLE.format(error)}", 1)

    def not_begun(self, error: Exception) -> int:
        """Ends a run whose next attempt cannot begin; returns the exit code."""
        return self._fail(f"the ranks cannot be started again: {error}", 1)

    def _handle(self, status: int) -> int:
        state, attempt = self._state, self._state.attempt
        if not self._journal.is_in_place():  # what is at its path now is not of this run
            return self._fail(MOVED.format(self._session.folder), 1)
        if attempt.ended is not None:
            return self._end_regularly(attempt.ended.reason)
        if state.stop_now and not attempt.failed_by_itself:
            return self._set_stopped("stopped at once, nothing was saved")
        failure = self._cause(status)
        if failure.damaged:
            earlier = earlier_checkpoint(self._session, attempt.start)
            if earlier is not None and not state.stop_now:
                text = f"{failure.text}; resuming from the one before, of step {earlier.from_step}"
                log.error(text, extra=NOTICED)
                self._publisher.notice("checkpoint", text, earlier.from_step)
                state.next = earlier
                return 1
            text = f"{failure.text}; {self._advice(attempt.start.from_step)}"
            failure = msgspec.structs.replace(failure, text=text)
        final = failure.final or failure.user_input or state.stop_now
        other_settings = bool(failure.changes) and not state.stop_now
        again = not final and self._restarts < self._config.launch.max_restarts
        if (again or other_settings) and (problem := self._no_start()):
            again = other_settings = False
            failure = msgspec.structs.replace(failure, text=f"{failure.text}; {problem}")
        data = {"text": failure.text, "traceback": failure.traceback}
        self._journal.record_event("error", data)
        if other_settings:
            self._restart_with_changes(failure)
        elif again:
            self._restart(failure)
        else:
            code = 2 if failure.user_input and not state.began else 1
            return self._fail(failure.text, code)
        return 1

    def _no_start(self) -> str | None:
        """Why no attempt may follow: from an earlier checkpoint, steps would be abandoned."""
        try:
            return all_lost(self._session)
        except OSError as error:
            return UNREADABLE.format(error)

    def _end_regularly(self, reason: str) -> int:
        """Sets the state after the ranks reported their end, or restarts them."""
        restart = reason in RESTART_REASONS
        if restart and not self._state.stopping:
            step = self._start_from_last_checkpoint()
            self._publisher.notice("machines", RESTART_REASONS[reason].format(step), step)
            return 0
        text, early = self._end_text(reason), reason in ("deadline", "preempted")
        if early or restart or reason == "stopped":
            return self._set_stopped(text, early=early)
        return self._set_end("finished", text, 0)

    def _set_stopped(self, text: str, *, early: bool = False) -> int:
        """Sets the final state `stopped`; `early`: the run was ended as by a scheduler."""
        preempted = early or self._state.preempted
        code = self._config.launch.preempted_exit if preempted else 0
        return self._set_end("stopped", text, code)

    def _fail(self, text: str, code: int) -> int:
        """Ends the session as failed."""
        log.error(text, extra=NOTICED)
        return self._set_end("failed", text, code)

    def _set_end(self, end: State, text: str, code: int) -> int:
        """Sets the session's final state, and its exit code, which other machines read."""
        with contextlib.suppress(sqlite3.Error):  # of a full disk; the state matters more
            self._journal.set_meta(exit_code=code)
        self._publisher.set_state(end, text)
        return code

    def _start_from_last_checkpoint(self) -> int:
        """Schedules another attempt; returns the step that it starts from."""
        step = last_checkpoint(self._session)
        self._state.next = StartOptions(from_step=step)
        return step

    def _restart(self, failure: Failed) -> None:
        """Restarts the ranks after a failure that may not recur."""
        self._restarts += 1
        if self._state.attempt.ready:
            self._pending.attempt_failed()
        step = self._start_from_last_checkpoint()
        number = f"restart {self._restarts} of {self._config.launch.max_restarts}"
        log.error("%s; %s", failure.text, number, extra=NOTICED)
        text = f"{failure.text}: {number} from step {step}"
        self._publisher.notice("restart", text, self._journal.step)

    def _restart_with_changes(self, failure: Failed) -> None:
        """Restarts the ranks with other settings from the failed step on.

        This does not count towards `launch.max_restarts`, because it is not the same start. The
        steps since the checkpoint are repeated with the settings that they had.
        """
        step = self._start_from_last_checkpoint()
        words = ", ".join(f"{c.key} {c.new} instead of {c.old}" for c in failure.changes)
        text = f"{failure.text}: restart from step {step}, from step {failure.step} with {words}"
        log.warning(text, extra=NOTICED)
        adjusted = Adjusted(step=failure.step, changes=failure.changes, rule="memory", text=text)
        record_adjustment(adjusted, self._state, self._journal, self._publisher)

    def _cause(self, status: int) -> Failed:
        logs = self._session.recorded_command("logs")
        return self._state.attempt.cause(status, self._config.launch, logs)

    def _unrecorded_end(self, status: int, error: sqlite3.Error) -> str:
        """How the attempt ended and what is saved, for when the journal cannot be written."""
        step = self._journal.step
        known = self._journal.checkpoints.steps()
        saved = max((s for s in checkpoint_steps(self._session) if s in known), default=0)
        if self._state.attempt.ended is not None:
            text = f"training has ended after step {step}"
        else:
            text = self._cause(status).text
        kept = f"the checkpoint of step {saved} is complete" if saved else "there is no checkpoint"
        return (
            f"{text}, which cannot be recorded in {self._session.folder} ({error}); the steps up "
            f"to {step} are recorded and {kept}; solve this, then: "
            f"{self._session.recorded_command('resume')}"
        )

    def _advice(self, damaged: int) -> str:
        others = [str(step) for step in timeline_checkpoints(self._session) if step != damaged]
        if not others:
            return "there is no other one to resume from"
        return f"resume from another one ({', '.join(others)}) with --from STEP"

    def _end_text(self, reason: str) -> str:
        aim = self._config.train.stop_at
        if reason == "stop_at" and aim is not None:
            bounds = f"> {aim.above:g}" if aim.above is not None else f"< {aim.below:g}"
            return f"train.stop_at is reached: {aim.metric} {bounds}"
        if reason == "deadline":
            return "saved before the deadline (train.save_before_deadline)"
        if reason == "preempted":
            return "saved, because a scheduler ends a machine of the run"
        return "train.max_hours is used up" if reason == "max_hours" else ""
