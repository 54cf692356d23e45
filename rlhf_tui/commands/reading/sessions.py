"""Commands on sessions: ls, status."""

import time
from pathlib import Path

import click
import msgspec

from engine.errors import LinkError, UserInputError
from engine.examined import examined
from engine.session.folder import all_sessions
from engine.session.states import ENDED_STATES
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    check_listable,
    existing_or_live,
    folder_is_given,
    json_option,
    live_elsewhere,
    optional_name_argument,
    print_json,
    say,
    sessions_option,
    show_wait,
)
from rlhf_tui.commands.reading.event_lines import STATE_TONES
from rlhf_tui.state.runs.session_row import SessionRow, read_session_row, read_session_rows
from rlhf_tui.text import one_line


@click.command()
@click.argument("address", required=False)
@sessions_option
@json_option
def ls(address: str | None, root: Path, as_json: bool) -> None:
    """List the sessions in the folder and live ones elsewhere.

    With --sessions, lists only those in that folder.

    With ADDRESS, ssh://[USER@]HOST[:PORT], lists those on another machine.
    """
    if not address:
        check_listable(root)
    local = [] if address else all_sessions(root.resolve())
    if address:
        options = ["--sessions", str(root)] if folder_is_given() else []
        rows = _remote_rows(address, options)
    else:
        elsewhere = [s for s in live_elsewhere() if s not in local]
        # Only the JSON has the best checkpoints, which take most of the time.
        rows = read_session_rows([*local, *elsewhere], best=as_json)
    if as_json:
        print_json([r.as_json() for r in rows])
    elif not rows:
        demo = fmt.command("demo", root=None if address else root)
        say(f"no sessions in {address or root.absolute()}; start one with: {demo}")
    else:
        header = ["name", "state", "step", "beta", "score", "KL", "size", "last active", ""]
        folders = {str(s.folder) for s in local}
        cells = [_ls_cells(r, local=bool(address) or r.folder in folders) for r in rows]
        lines = fmt.aligned([header, *cells])
        say("  ".join(lines[0]).rstrip())
        for row, line in zip(rows, lines[1:], strict=True):
            name, state, *rest = line
            tone = STATE_TONES.get(row.state, "")
            say(f"{name}  ", (state, tone), "  " + "  ".join(rest).rstrip())


def _remote_rows(address: str, options: list[str]) -> list[SessionRow]:
    """The sessions of another machine. Raises UserInputError or LinkError."""
    from rlhf_tui.remote.ssh import Address, run  # noqa: PLC0415 - only few list other machines

    parsed = Address.parse(address)
    if parsed.name:
        attach = fmt.command("attach", address)
        raise UserInputError(f"ls does not take a session: use {attach} to open it")
    show_wait(f"connecting to {parsed.host}")
    output = run(parsed, "ls", "--json", *options)
    try:
        return msgspec.json.decode(output, type=examined(list[SessionRow]))
    except msgspec.DecodeError as error:
        raise LinkError(f"{parsed.host} sent no list of sessions: {error}") from error


def _ls_cells(row: SessionRow, *, local: bool) -> list[str]:
    age = f"{fmt.duration(time.time() - row.updated)} ago" if row.updated else "–"
    return [
        row.name if local else f"{row.name} ({row.folder})", row.state,
        f"{row.step}/{row.total_steps or '?'}", fmt.number(row.beta, 4), fmt.number(row.score),
        fmt.number(row.kl, 2), fmt.size(row.size) if row.size is not None else "–", age,
        one_line(_reason(row), 100),
    ]  # fmt: skip


def _reason(row: SessionRow) -> str:
    """What the run waits for or was paused by, or why it cannot be read; usually empty."""
    if row.state == "unreadable":
        return row.message
    return ", ".join(_reasons(row))


def _state_text(row: SessionRow) -> str:
    """The state: `running`, `paused by kl_high at step 4: KL 7.26 > 6`."""
    reasons = _reasons(row)
    return ", ".join(reasons if row.pause_reason else [row.state, *reasons])


def _reasons(row: SessionRow) -> list[str]:
    """What paused the run, and what its engine waits for: `waits for room on the disk`."""
    paused = [f"paused by {row.pause_reason}"] if row.pause_reason else []
    return paused + ([f"waits for {row.waits_for}"] if row.waits_for else [])


@click.command()
@optional_name_argument
@sessions_option
@json_option
def status(root: Path, name: str | None, as_json: bool) -> None:
    """Show a session's status.

    Without NAME: that of the only live one.
    """
    session = existing_or_live(root, name)
    row = read_session_row(session, ask=True, best=True)
    if as_json:
        print_json(row.as_json())
        return
    engine = f"pid {row.pid} on {row.host}" if row.pid else "none"
    said, message = one_line(_state_text(row)), one_line(row.message)
    if message.startswith(said):  # "stopped at once, nothing was saved"
        message = message.removeprefix(said)
    elif message:
        message = f" ({message})"
    tone = "warn" if row.waits_for else STATE_TONES.get(row.state, "")
    say(f"{row.name}: ", (said, tone), message)
    say(f"  step        {row.step} of {row.total_steps}, attempt {row.attempt}")
    if row.score is not None or row.kl is not None:
        say(f"  score, KL   {fmt.number(row.score)}, {fmt.number(row.kl)} nats per response")
    if row.held_out is not None:
        score = fmt.with_interval(row.held_out.score, row.held_out.interval)
        say(f"  held-out    {score} (step {row.held_out.step})")
    say(f"  beta        {fmt.number(row.beta, 4)}")
    steps = ", ".join(
        f"{s} (best)" if s == row.best_checkpoint else str(s) for s in row.checkpoints
    )
    say(f"  checkpoints {f'of step {steps}' if steps else 'none'}")
    if row.moved_aside:
        say(f"  moved aside {', '.join(row.moved_aside)}, of abandoned branches")
    say(f"  engine      {engine}")
    if row.deadline is not None:
        say(f"  deadline    saves and ends before {fmt.clock(row.deadline)}")
    size = f", {fmt.size(row.size)}" if row.size is not None else ""
    say(f"  folder      {row.folder}{size}")
    if row.state not in ENDED_STATES and not row.pid:
        say(f"  resume with {fmt.command('resume', row.name, root=Path(row.folder).parent)}")
    elif row.state == "paused":
        unpause = fmt.command("ctl", row.name, "unpause", root=Path(row.folder).parent)
        say(f"  unpause with {unpause}")
