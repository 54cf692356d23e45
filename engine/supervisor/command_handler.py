"""The desk of a live session: takes commands in, and says how things stand."""

import os
import signal

from engine.config import file as config_file
from engine.errors import RlhfError
from engine.launch.start import StartOptions
from engine.monitoring.guardrails import Alert
from engine.protocol.client import new_id
from engine.protocol.client_messages import CommandReply, CommandRequest, JournalAdvanced, Status
from engine.protocol.commands import Checkpoint, Pause, Rollback, Stop, command_name
from engine.protocol.rank_messages import RankCommand
from engine.session.folder import ENDED_STATES
from engine.supervisor.command_checks import check_command
from engine.supervisor.state import SupervisorState


class CommandHandler:
    """Handles requests of clients, and signals."""

    def __init__(self, live: SupervisorState) -> None:
        self._live = live

    def answer(self, request: CommandRequest, who: str) -> CommandReply:
        """Takes a command in: journalled, checked, and passed on where it needs a rank."""
        live = self._live
        command = request.command
        if not live.journal.record_command(
            request.id, command_name(command), config_file.as_mapping(command), who
        ):
            return live.journal.answer(request.id)
        state = "stopping" if live.stop_now else live.herald.state
        batch = live.config.rollout.batch_size
        try:
            check_command(
                command, state, live.settings, live.session, paused=live.paused, batch=batch
            )
        except RlhfError as error:
            live.journal.reject_command(request.id, str(error))
            live.server.wake()
            return live.journal.answer(request.id)
        live.journal.accept_command(request.id)
        self._act(request, who)
        live.server.wake()
        return live.journal.answer(request.id)

    def _act(self, request: CommandRequest, who: str) -> None:
        live = self._live
        match request.command:
            case Stop(now=now) if now or live.herald.state == "starting":
                self._end_now(request.id)  # while loading there is nothing to save
            case Rollback(step=step, reseed=reseed):
                live.next = StartOptions(from_step=step, fresh=True, reseed=reseed, who=who)
                live.journal.apply_command(request.id, step + 1, [])
                live.ranks.kill()
            case command if command_name(command) == "note":
                live.journal.apply_command(request.id, live.journal.step + 1, [])
            case command:
                if isinstance(command, Stop):
                    live.stopping = True
                    live.herald.set_state("stopping")
                elif isinstance(command, Pause):
                    live.herald.set_state("pausing")
                order = RankCommand(id=request.id, command=command)
                live.orders.add(order, who)
                live.attempt.send(order)

    def _end_now(self, command_id: str) -> None:
        live = self._live
        live.stopping = live.stop_now = True
        live.next = None  # nor does a roll back under way begin
        live.journal.apply_command(command_id, live.journal.step + 1, [])
        live.ranks.kill()

    def on_signal(self, number: signal.Signals) -> None:
        """The first one stops after the step in hand, saved; a second ctrl+c does not wait."""
        again = self._live.stopping and number == signal.SIGINT
        if again or not self._live.stopping:
            self.answer(CommandRequest(id=new_id(), command=Stop(now=again)), number.name)

    def on_alert(self, alert: Alert) -> None:
        """Something deserves a look, and may ask for a command."""
        self._live.herald.alert(alert)
        acts = {"checkpoint": Checkpoint(), "pause": Pause(), "stop": Stop()}
        if alert.action in acts and self._live.herald.state not in ("stopping", *ENDED_STATES):
            request = CommandRequest(id=new_id(), command=acts[alert.action])  # type: ignore[arg-type]
            self.answer(request, f"guard rail {alert.rule}")

    def status(self) -> Status:
        """How things stand."""
        live = self._live
        moving = live.herald.state in ("running", "pausing", "stopping")
        return Status(
            state=live.herald.state,
            step=live.journal.step,
            total_steps=live.config.train.steps,
            attempt=live.journal.attempt,
            settings=live.settings,
            phases=list(live.phases.values()),
            step_seconds=live.pace.step_seconds,
            boundary_in=live.pace.left() if moving else None,
            pending=live.orders.pending(),
            telemetry=live.watchman.latest,
            watchers=live.server.watchers,
            pid=os.getpid(),
        )

    def wake(self) -> JournalAdvanced:
        """How far the journal is."""
        live = self._live
        return JournalAdvanced(
            step=live.journal.step, event=live.journal.last_event, state=live.herald.state
        )
