"""Commands that only look: ls, status, metrics, samples, events, logs."""

import time
from pathlib import Path
from typing import Any

import click

from engine.errors import RlhfError
from engine.journal.labels import with_judgements
from engine.journal.reader import JournalReader
from engine.session.folder import Session, all_sessions
from engine.session.registry import live_sessions
from engine.session.states import ENDED_STATES
from rlhf_tui import format as fmt
from rlhf_tui.commands.options import (
    existing,
    json_option,
    last_option,
    name_argument,
    print_json,
    say,
    sessions_option,
)
from rlhf_tui.text import one_line, sanitise

FOLLOW_INTERVAL = 0.2
"""Seconds between looks at a log that is followed."""
COLUMNS = (
    "objective/scores", "objective/kl", "objective/kl_coef", "policy/clipfrac_avg",
    "policy/entropy_avg", "tokens/response_len_mean", "time/step",
)  # fmt: skip


@click.command()
@sessions_option
@json_option
def ls(root: Path, as_json: bool) -> None:
    """List the sessions."""
    here = all_sessions(root.resolve())
    elsewhere = [s for s in live_sessions() if s not in here]
    rows = [_summary_or_why_not(s) for s in [*here, *elsewhere]]
    if as_json:
        print_json(rows)
    elif not rows:
        say(f"no sessions in {root}; start one with: rlhf-tui demo")
    else:
        header = ["name", "state", "step", "beta", "score", "last active"]
        inside = {str(s.folder) for s in here}
        say(fmt.table([_ls_row(r | {"here": r["folder"] in inside}) for r in rows], header))


def _summary_or_why_not(session: Session) -> dict[str, Any]:
    """A session that was damaged, or is of a newer version, must not hide the others."""
    try:
        return summary(session)
    except RlhfError as error:
        unknown = dict.fromkeys(("pid", "host", "beta", "score", "kl", "total_steps", "updated"))
        return unknown | {
            "name": session.name, "state": "unreadable", "step": 0, "attempt": 0, "settings": {},
            "checkpoints": [], "message": str(error), "folder": str(session.folder),
        }  # fmt: skip


def _ls_row(row: dict[str, Any]) -> list[str]:
    age = f"{fmt.duration(time.time() - row['updated'])} ago" if row["updated"] else "–"
    name = row["name"] if row["here"] else f"{row['name']} ({row['folder']})"
    return [
        name, row["state"], f"{row['step']}/{row['total_steps'] or '?'}",
        fmt.number(row["beta"], 4), fmt.number(row["score"]), age,
    ]  # fmt: skip


def summary(session: Session) -> dict[str, Any]:
    """A session in one row: what `status --json` prints."""
    with JournalReader(session) as record:
        meta, attempts = record.meta(), record.attempts()
        state, last = record.state(), record.metrics(last=1)
        checkpoints = [c["step"] for c in record.checkpoints(("complete",))]
    engine = session.engine() if session.is_live() else None
    row = last[0] if last else {}
    settings = meta.get("settings") or {}
    return {
        "name": session.name,
        "state": state,
        "step": row.get("step", 0),
        "total_steps": meta.get("total_steps") or session.config().train.steps,
        "attempt": len(attempts),
        "beta": settings.get("beta", session.config().kl.beta),
        "pid": engine.pid if engine else None,
        "host": engine.host if engine else None,
        "score": row.get("objective/scores"),
        "kl": row.get("objective/kl"),
        "settings": settings,
        "checkpoints": checkpoints,
        "message": meta.get("message", ""),
        "updated": row.get("time") or (attempts[-1]["started"] if attempts else None),
        "folder": str(session.folder),
    }


@click.command()
@name_argument
@sessions_option
@json_option
def status(root: Path, name: str, as_json: bool) -> None:
    """Say how a session is."""
    row = summary(existing(root, name))
    if as_json:
        print_json(row)
        return
    engine = f"pid {row['pid']} on {row['host']}" if row["pid"] else "none"
    say(f"{row['name']}: {row['state']}" + (f" ({row['message']})" if row["message"] else ""))
    say(f"  step        {row['step']} of {row['total_steps']}, attempt {row['attempt']}")
    say(f"  score, KL   {fmt.number(row['score'])}, {fmt.number(row['kl'])} nats per response")
    say(f"  beta        {fmt.number(row['beta'], 4)}")
    say(f"  checkpoints {', '.join(map(str, row['checkpoints'])) or 'none'}")
    say(f"  engine      {engine}")
    say(f"  folder      {row['folder']}")
    if row["state"] not in ENDED_STATES and not row["pid"]:
        say(f"  go on with  rlhf-tui resume {row['name']}")


@click.command()
@name_argument
@sessions_option
@last_option
@json_option
def metrics(root: Path, name: str, last: int | None, as_json: bool) -> None:
    """Print a session's metrics, one row a step."""
    with JournalReader(existing(root, name)) as record:
        rows = record.metrics(last)
    if as_json:
        print_json(rows)
        return
    body = [[str(r["step"]), *(fmt.number(r.get(c)) for c in COLUMNS)] for r in rows]
    say(fmt.table(body, ["step", *(c.split("/")[1] for c in COLUMNS)]))


@click.command()
@name_argument
@sessions_option
@last_option
@json_option
def samples(root: Path, name: str, last: int | None, as_json: bool) -> None:
    """Print what the policy wrote."""
    session = existing(root, name)
    with JournalReader(session) as record:
        rows = with_judgements(session, record.samples(last if last or as_json else 16))
    if as_json:
        print_json(rows)
        return
    for row in rows:
        score, kl = fmt.number(row["score"]), fmt.number(row["kl"], 2)
        label = f"  {row['label']}" if row["label"] else ""
        say(f"step {row['step']} #{row['index']}  score {score}  kl {kl}{label}")
        say(f"  {one_line(row['prompt'])}│{one_line(row['response'])}")
        if row["note"]:
            say(f"  note: {one_line(row['note'])}")


@click.command()
@name_argument
@sessions_option
@last_option
@json_option
def events(root: Path, name: str, last: int | None, as_json: bool) -> None:
    """Print what happened: states, commands, checkpoints, alerts."""
    with JournalReader(existing(root, name)) as record:
        rows = record.events(last)
    if as_json:
        print_json(rows)
        return
    common = {"event", "time", "attempt", "step", "kind", "traceback"}
    for row in rows:
        details = "  ".join(f"{k}={v}" for k, v in row.items() if k not in common and v)
        say(
            f"{fmt.clock(row['time'])}  step {row['step']:<6} {row['kind']:<10} {one_line(details)}"
        )
        if row.get("traceback"):
            say(row["traceback"])


@click.command()
@name_argument
@sessions_option
@last_option
@click.option("-f", "--follow", is_flag=True, help="Go on until the engine ends.")
@json_option
def logs(root: Path, name: str, last: int | None, follow: bool, as_json: bool) -> None:
    """Print what the engine wrote to its log."""
    session = existing(root, name)
    if not session.log_file.exists():
        say("[]" if as_json else f"no engine of '{name}' has written a log yet")
        return
    with session.log_file.open(encoding="utf-8", errors="replace", newline="") as file:
        # A progress bar rewrites its line: what it looked like last is what counts.
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in file.read().split("\n")]
        lines = [line for line in lines if line][-last if last else 0 :]
        if as_json:
            print_json(lines)
            return
        for line in lines:
            say(sanitise(line))
        while follow:
            live = session.is_live()  # asked first: what it says last is still read
            if new := file.read():
                click.echo(sanitise(new.replace("\r", "\n")), nl=False)
            elif live:
                time.sleep(FOLLOW_INTERVAL)
            else:
                return
