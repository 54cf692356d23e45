"""Commands that steer a live engine: ctl, note."""

import contextlib
import difflib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from engine.api.session import Session
from engine.config.settings import LIVE_SETTINGS, Settings
from engine.config.yaml_document import parse_yaml
from engine.errors import CommandRejectedError, RlhfError, UserInputError
from engine.examined import examined
from engine.journal.json_values import Json
from engine.journal.last_reply import last_reply
from engine.journal.rows import ProbeResult
from engine.protocol.client import Client, new_id
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import (
    AnyCommand,
    Checkpoint,
    Command,
    DeleteCheckpoint,
    Note,
    Pause,
    Probe,
    Rollback,
    SetBeta,
    SetKLController,
    SetSetting,
    Stop,
    Undo,
    Unpause,
    check_in_order,
)
from engine.session.folder import SessionFolder
from rlhf_tui import format as fmt
from rlhf_tui.commands.checkpoint_step import StepChoice, checkpoint_step, step_choice
from rlhf_tui.commands.options import (
    JSON,
    SESSIONS,
    FiniteRange,
    existing,
    json_option,
    name_argument,
    print_json,
    say,
    say_turns,
    sessions_option,
    utf8_text,
)
from rlhf_tui.commands.shell_complete import Group, complete_setting, complete_step
from rlhf_tui.identity import who
from rlhf_tui.state.timeline import WITHOUT_STEP, changes_text, effect_text
from rlhf_tui.text import one_line

TIMED_OUT = 4
WAIT = "Return once the command is applied or rejected."
TIMEOUT = "How long --wait waits.  [default: 600]"
COMMAND_ID = "Idempotency key: a command sent again with the same id is not repeated."
END_TIMEOUT = 30.0
"""Seconds to wait for the engine's process to exit after `stop --wait`."""


@dataclass
class CtlCall:
    """The options of one `ctl` call; sends its command and prints the outcome."""

    root: Path
    name: str
    wait: bool
    timeout: float
    as_json: bool
    command_id: str | None

    def send(self, command: AnyCommand) -> None:
        """Sends a command, waits with --wait, and prints the reply. Exits with 4 on timeout.

        Raises:
            RlhfError: the command was rejected, or there is no engine.
        """
        session = existing(self.root, self.name)
        command_id = self.command_id or new_id()
        with Client(session, who()) as client:
            # Before the command: a stop may end the engine as soon as it has replied.
            seconds_left = client.status().boundary_in
            reply = client.send(command, command_id)
            # A probe always waits: its result is the reason to send it.
            if self.wait or isinstance(command, Probe):
                reply = self._last(client, session, command, reply, self.timeout)
        if reply.reason and reply.status != "rejected":
            click.echo(f"rlhf-tui: {one_line(reply.reason)}", err=True)
        if self.wait and isinstance(command, Stop) and reply.status == "applied":
            self._wait_for_exit(session)
        if self.as_json:
            print_json(_row(reply))
        else:
            self._print(command, reply, seconds_left)
        if isinstance(command, Stop) and reply.status == "accepted" and not self.as_json:
            now = fmt.command("ctl", self.name, "stop", "--now", root=session.folder.parent)
            say(f"to end at once, without this step: {now}")
        if reply.status == "rejected":
            raise RlhfError(f"rejected: {reply.reason}")

    def send_in_order(self, commands: Sequence[SetSetting]) -> None:
        """Like :meth:`send`, for several changes of settings; sends none if one is wrong.

        The id of each but the first is the given one with `-2`, `-3` and so on.

        Raises:
            RlhfError: a command was rejected, or there is no engine.
        """
        session = existing(self.root, self.name)
        first = self.command_id or new_id()
        ids = [first, *(f"{first}-{n}" for n in range(2, len(commands) + 1))]
        replies = []
        with contextlib.ExitStack() as stack:
            # A client each, because while one waits it drops the replies to other commands.
            clients = [stack.enter_context(Client(session, who())) for _ in commands]
            status = clients[0].status()
            settings = msgspec.convert(status.settings, examined(Settings), strict=False)
            try:
                check_in_order(commands, settings, session.config())
            except CommandRejectedError as error:
                raise RlhfError(f"rejected: {error}; nothing is changed") from error
            for client, command, command_id in zip(clients, commands, ids, strict=True):
                replies.append(client.send(command, command_id))
                if replies[-1].status == "rejected":  # somebody else has changed a setting
                    break
            if self.wait:
                deadline = time.monotonic() + self.timeout
                for i, reply in enumerate(replies):
                    left = max(deadline - time.monotonic(), 0)
                    replies[i] = self._last(clients[i], session, commands[i], reply, left)
        if self.as_json:
            print_json([_row(reply) for reply in replies])
        else:
            accepted = [reply for reply in replies if reply.status == "accepted"]
            for command, reply in zip(commands, replies, strict=False):
                if reply not in accepted[1:]:  # its line is the same for all
                    self._print(command, reply, status.boundary_in)
        for reply in replies:
            if reply.status == "rejected":
                raise RlhfError(f"rejected: {reply.reason}")

    def _last(
        self,
        client: Client,
        session: SessionFolder,
        command: AnyCommand,
        reply: CommandReply,
        timeout: float,
    ) -> CommandReply:
        """Waits for the last reply to a command. Exits with 4 on timeout."""
        if reply.final:
            return reply
        try:
            return last_reply(client, session, command, reply.id, timeout)
        except TimeoutError:
            events = fmt.command("events", self.name, root=session.folder.parent)
            click.echo(
                f"rlhf-tui: not applied within {self.timeout:g} s; still pending, see: {events}",
                err=True,
            )
            sys.exit(TIMED_OUT)

    @staticmethod
    def _wait_for_exit(session: SessionFolder) -> None:
        """Waits until the session can be resumed, forked or deleted."""
        deadline = time.monotonic() + END_TIMEOUT
        while session.is_live() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _print(self, command: AnyCommand, reply: CommandReply, seconds_left: float | None) -> None:
        if reply.status == "accepted":
            soon = "" if seconds_left is None else f", in about {fmt.duration(seconds_left)}"
            say(f"accepted: applies at the next step boundary{soon}")
        elif reply.status == "applied":
            done = changes_text(reply.changes)
            if reply.step is not None:
                done = done or effect_text(command.name(), reply.step)
            applied = WITHOUT_STEP.get(command.name()) or f"applied at step {reply.step}"
            say(applied + (f": {one_line(done)}" if done else ""))
            if isinstance(command, Probe):
                say(f"prompt: {one_line(command.text)}")
            if reply.result:
                probed = ProbeResult.of(reply.result)
                for model, found in (("policy", probed.policy), ("reference", probed.reference)):
                    say(f"{model}: score {fmt.number(found.score)}, KL {fmt.number(found.kl)}")
                    say_turns("", found.turns)
                if unscored := probed.policy.unscored or probed.reference.unscored:
                    say(f"no score: {one_line(unscored)}")


def _row(reply: CommandReply) -> Json:
    """A reply as printed with --json."""
    row: Json = msgspec.to_builtins(msgspec.structs.asdict(reply))
    return row | {"applied_step": row.pop("step")}


class Verbs(Group):
    """The verbs of `ctl`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb of these arguments. Raises UsageError if something else stands in its place.

        `ctl VERB --help`, where the verb stands in the place of NAME, asks for the help of the
        verb, and `ctl NAME --help` for that of all.
        """
        if args[0] in ctx.help_option_names:
            verb = self.commands.get(ctx.params["name"])
            if verb is not None:
                return verb.name, verb, args
            click.echo(ctx.get_help())
            ctx.exit()
        if args[0] == "note":
            note = fmt.command("note", ctx.params["name"], root=ctx.params["root"])
            raise click.UsageError(f"note is a command of its own: {note} TEXT", ctx)
        if args[0].startswith("-"):
            raise click.UsageError(f"give {args[0]} before NAME or after the verb", ctx)
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise click.UsageError(f"no verb '{args[0]}'{self._meant(ctx, args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def _meant(self, ctx: click.Context, word: str) -> str:
        """What may be meant by a verb that does not exist, to follow it in a message."""
        setting = word.partition("=")[0].rpartition(".")[2]
        if setting in LIVE_SETTINGS:
            command = fmt.command(
                "ctl", ctx.params["name"], "set", f"{setting}=VALUE", root=ctx.params["root"]
            )
            return f"; to change this setting: {command}"
        verbs = [name for name, verb in self.commands.items() if not verb.hidden]
        near = difflib.get_close_matches(word, verbs, n=1)
        return f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(verbs)}"


@click.group(cls=Verbs, no_args_is_help=False)
@name_argument
@sessions_option
@click.option("--wait", is_flag=True, help=WAIT)
@click.option("--timeout", type=FiniteRange(min=0), default=600.0, metavar="SECONDS", help=TIMEOUT)
@json_option
@click.option("--id", "command_id", metavar="ID", help=COMMAND_ID)
@click.pass_context
def ctl(
    context: click.Context,
    root: Path,
    name: str,
    wait: bool,
    timeout: float,
    as_json: bool,
    command_id: str | None,
) -> None:
    """Steer the live engine of session NAME."""
    context.obj = CtlCall(
        root, name, wait=wait, timeout=timeout, as_json=as_json, command_id=command_id
    )


def _verb(kind: type[Command], **options: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A verb of `ctl`, with the name and the help that the command declares."""
    return ctl.command(name=kind.name(), help=kind.summary, short_help=kind.summary, **options)


_WithoutArguments = Pause | Unpause | Checkpoint | Undo


def _verb_without_arguments(kind: type[_WithoutArguments]) -> None:
    @_verb(kind)
    @click.pass_obj
    def send(call: CtlCall) -> None:
        call.send(kind())


for _kind in get_args(_WithoutArguments):
    _verb_without_arguments(_kind)
ctl.add_command(
    click.Command(
        "resume", callback=ctl.commands["unpause"].callback, help=Unpause.summary, hidden=True
    )
)


@_verb(Stop)
@click.option("--now", is_flag=True, help="Stop immediately, without a checkpoint.")
@click.pass_obj
def stop(call: CtlCall, now: bool) -> None:
    call.send(Stop(now=now))


@_verb(Rollback)
@click.argument("step", type=step_choice, shell_complete=complete_step)
@click.option(
    "--reseed", is_flag=True, help="Use a new random seed, to sample different responses."
)
@click.pass_obj
def rollback(call: CtlCall, step: StepChoice, reseed: bool) -> None:
    chosen = checkpoint_step(existing(call.root, call.name), step)
    call.send(Rollback(step=chosen, reseed=reseed))


@_verb(DeleteCheckpoint)
@click.argument("step", type=step_choice, shell_complete=complete_step)
@click.pass_obj
def delete_checkpoint(call: CtlCall, step: StepChoice) -> None:
    call.send(DeleteCheckpoint(step=checkpoint_step(existing(call.root, call.name), step)))


# With unknown options ignored, -1 is a value and not an option.
@_verb(SetBeta, context_settings={"ignore_unknown_options": True})
@click.argument("value", type=float)
@click.pass_obj
def beta(call: CtlCall, value: float) -> None:
    call.send(SetBeta(value=value))


@_verb(SetKLController)
@click.argument("controller", type=click.Choice(["fixed", "adaptive"]))
@click.option("--target", type=float, metavar="NATS", help="Target KL, nats per response.")
@click.option("--horizon", type=float, metavar="N", help="Horizon of the controller, episodes.")
@click.option("--beta-min", type=float, metavar="BETA", help="The adaptive controller's minimum.")
@click.option("--beta-max", type=float, metavar="BETA", help="The adaptive controller's maximum.")
@click.pass_obj
def kl(call: CtlCall, /, **given: Any) -> None:
    call.send(SetKLController(**given))


@_verb(SetSetting)
@click.argument(
    "assignments", metavar="KEY=VALUE...", nargs=-1, required=True, shell_complete=complete_setting
)
@click.pass_obj
def set_(call: CtlCall, assignments: tuple[str, ...]) -> None:
    commands = [_setting(assignment) for assignment in assignments]
    if len(commands) == 1:
        call.send(commands[0])
    else:
        call.send_in_order(commands)


def _setting(assignment: str) -> SetSetting:
    """The command for `key=value`. Raises UserInputError."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise UserInputError(f"set takes key=value, not '{assignment}'")
    return SetSetting(key=key.strip(), value=parse_yaml(text, key, key.strip()))


@_verb(Probe)
@click.argument("text", callback=utf8_text)
@click.pass_obj
def probe(call: CtlCall, text: str) -> None:
    call.send(Probe(text=text))


def _shared_option(flag: str, attribute: str, text: str, **options: Any) -> click.Option:
    """An option of `ctl` that may also follow the verb; it sets an attribute of the call."""

    def callback(context: click.Context, _option: click.Parameter, value: Any) -> None:
        if value is not None and value is not False:  # given; 0 seconds are
            setattr(context.obj, attribute, value)

    return click.Option([flag], help=text, expose_value=False, callback=callback, **options)


def _shared_options() -> list[click.Option]:
    return [
        _shared_option("--wait", "wait", WAIT, is_flag=True),
        _shared_option("--timeout", "timeout", TIMEOUT, type=FiniteRange(min=0), metavar="SECONDS"),
        _shared_option("--json", "as_json", JSON, is_flag=True),
        _shared_option("--id", "command_id", COMMAND_ID, metavar="ID"),
        _shared_option("--sessions", "root", SESSIONS, type=click.Path(path_type=Path)),
    ]


for _command in ctl.commands.values():
    _command.params += _shared_options()


@click.command(help=Note.summary)
@name_argument
@click.argument("text", callback=utf8_text)
@sessions_option
def note(root: Path, name: str, text: str) -> None:
    try:
        step = Session(existing(root, name).folder, who=who()).note(text)
    except CommandRejectedError as error:
        raise RlhfError(f"rejected: {error}") from error
    say(f"noted at step {step}: {one_line(text)}")
