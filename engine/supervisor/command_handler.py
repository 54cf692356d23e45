"""The desk of a live session: takes commands in, and says how things stand."""

import os
import signal
from functools import partial

import msgspec

from engine.config import file as config_file
from engine.config.settings import Settings
from engine.errors import RlhfError
from engine.launch.start import StartOptions, timeline_checkpoints
from engine.monitoring.guardrails import Alert
from engine.protocol.client import new_id
from engine.protocol.client_messages import CommandReply, CommandRequest, JournalAdvanced, Status
from engine.protocol.commands import (
    AnyCommand,
    Checkpoint,
    Moment,
    Note,
    Pause,
    Rollback,
    Stop,
    check_command,
)
from engine.protocol.rank_messages import RankCommand
from engine.session.states import ENDED_STATES
from engine.supervisor.state import SupervisorState

ACTIONS: dict[str, AnyCommand] = {"checkpoint": Checkpoint(), "pause": Pause(), "stop": Stop()}
"""`action` of a guard rail → what is asked when it speaks; `notify` asks for nothing."""


class CommandHandler:
    """Handles requests of clients, and signals."""

    def __init__(self, live: SupervisorState) -> None:
        self._live = live

    def answer(self, request: CommandRequest, who: str) -> CommandReply:
        """Takes a command in: journalled, checked, and passed on where it needs a rank."""
        live = self._live
        command = request.command
        if not live.journal.commands.record(
            request.id, command.name(), config_file.as_mapping(command), who
        ):
            return live.journal.commands.reply(request.id)
        try:
            check_command(command, self._moment())
        except RlhfError as error:
            live.journal.commands.reject(request.id, str(error))
            live.server.wake()
            return live.journal.commands.reply(request.id)
        live.journal.commands.accept(request.id)
        self._act(request, who)
        live.server.wake()
        return live.journal.commands.reply(request.id)

    def _moment(self) -> Moment:
        live = self._live
        return Moment(
            state="stopping" if live.stop_now else live.herald.state,
            paused=live.paused,
            settings=msgspec.convert(live.settings, Settings, strict=False),
            batch_size=live.config.rollout.batch_size,
            checkpoint_steps=partial(timeline_checkpoints, live.session),
        )

    def _act(self, request: CommandRequest, who: str) -> None:
        """Carries out what is the supervisor's; the type of a RankCommand holds only the rest."""
        live = self._live
        match request.command:
            case Stop(now=now) if now or live.herald.state == "starting":
                self._end_now(request.id)  # while loading there is nothing to save
            case Rollback(step=step, reseed=reseed):
                live.next = StartOptions(from_step=step, fresh=True, reseed=reseed, who=who)
                live.journal.commands.apply(request.id, step + 1, [])
                live.ranks.kill()
            case Note():
                live.journal.commands.apply(request.id, live.journal.step + 1, [])
            case command:
                live.stopping = live.stopping or isinstance(command, Stop)
                if command.state_when_accepted is not None:
                    live.herald.set_state(command.state_when_accepted)
                order = RankCommand(id=request.id, command=command)
                live.orders.add(order, who)
                live.attempt.send(order)

    def _end_now(self, command_id: str) -> None:
        live = self._live
        live.stopping = live.stop_now = True
        live.next = None  # nor does a roll back under way begin
        live.journal.commands.apply(command_id, live.journal.step + 1, [])
        live.ranks.kill()

    def on_signal(self, number: signal.Signals) -> None:
        """The first one stops after the step in hand, saved; a second ctrl+c does not wait."""
        again = self._live.stopping and number == signal.SIGINT
        if again or not self._live.stopping:
            self.answer(CommandRequest(id=new_id(), command=Stop(now=again)), number.name)

    def on_alert(self, alert: Alert) -> None:
        """Something deserves a look, and may ask for a command."""
        self._live.herald.alert(alert)
        command = ACTIONS.get(alert.action)
        if command is not None and self._live.herald.state not in ("stopping", *ENDED_STATES):
            self.answer(CommandRequest(id=new_id(), command=command), f"guard rail {alert.rule}")

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
