"""The log that `events` prints: one line an event, as one reads it to a colleague."""

import json

import pytest

from engine.config.settings import SettingChange
from engine.journal.rows import AttemptRow, CommandRow, EventRow, decode_payload
from rlhf_tui.commands.reading.event_lines import event_lines


def event(kind, step=4, command=None, **data):
    text, number = json.dumps(data), data.get("attempt", 1)
    return EventRow(
        event=1, time=0.0, attempt=number, step=step, kind=kind, payload=decode_payload(kind, text),
        data=text, command=command,
    )  # fmt: skip


def attempt(number, pid, ended=None):
    return AttemptRow(
        attempt=number, from_step=0, fresh=False, started=0.0, ended=ended, pid=pid, host="a",
        version="1",
    )  # fmt: skip


def command(**given):
    values = {"id": "x", "command": "beta", "args": {"value": 0.2}, "who": "ana", "attempt": 1}
    row = CommandRow(**{"status": "applied", "queued": 0.0, "applied_step": 5} | values | given)
    return event("command", command=row, id="x")


def lines(*events, attempts=(), crashed=False):
    return [f"{e.kind}: {e.text}" for e in event_lines(events, attempts, crashed=crashed)]


CHANGE = [SettingChange(key="beta", old=0.1, new=0.2)]
WINDOW = {"rule": "kl_high", "text": "KL is 7", "window": [1, 2], "samples": [{"prompt": "p"}]}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (command(changes=CHANGE), "command: ana: beta 0.1 → 0.2, applied at step 5"),
        (
            command(changes=[*CHANGE, SettingChange(key="target", old=6.0, new=6)]),
            "command: ana: beta 0.1 → 0.2, applied at step 5",
        ),
        (
            command(changes=[SettingChange(key="controller", old="adaptive", new="adaptive")]),
            "command: ana: controller adaptive unchanged, applied at step 5",
        ),
        (
            command(status="rejected", reason="no"),
            "command: ana: beta 0.2, rejected: no",
        ),
        (command(status="accepted"), "command: ana: beta 0.2, applies at the next step boundary"),
        (
            command(command="stop", args={"now": True}),
            "command: ana: stop now, applied at step 5",
        ),
        (event("alert", **WINDOW), "alert: kl_high: KL is 7"),
        (event("alert", rule="restart", text="restart 1 of 3"), "restart: restart 1 of 3"),
        (event("checkpoint", size=1_200_000, score=1.0, kl=2.0), "checkpoint: saved, 1.2 MB"),
        (event("note", id="1-2", who="ana", text="odd"), "note: ana: odd"),
        (event("error", text="gone", traceback="long"), "error: gone"),
        (event("state", state="paused", text="r at step 4: x"), "state: paused by r at step 4: x"),
        (
            event("attempt", attempt=2, from_step=4, fork={"from": "run", "step": 4}),
            "attempt: 2: forked from step 4 of run",
        ),
        (event("ready"), "ready: models and data are loaded"),
        (event("ready", device="cuda"), "ready: models and data are loaded on a GPU"),
        (
            event("ready", device="cuda:0", ranks=8, strategy="fsdp"),
            "ready: models and data are loaded by 8 ranks on GPUs, fsdp",
        ),
        (
            event("ready", device="cpu", notes=["a chat model"]),
            "ready: models and data are loaded on the CPU; a chat model",
        ),
        (event("of a newer version", a=1), 'of a newer version: {"a": 1}'),
    ],
)
def test_an_event_is_a_line_without_ids_windows_and_epochs(row, line):
    assert lines(row) == [line]


def test_an_engine_that_died_stands_between_its_attempt_and_the_next():
    events = [event("attempt", attempt=n) for n in (1, 2, 3)]
    attempts = [attempt(1, pid=7), attempt(2, pid=8), attempt(3, pid=8)]
    died = "crash: engine died (no exit message)"
    assert [line == died for line in lines(*events, attempts=attempts)] == [
        False,
        True,
        False,
        False,
    ]
    assert lines(*events, attempts=attempts, crashed=True)[-1] == died


def test_the_live_engine_of_a_fork_s_parent_has_not_died():
    events = [
        event("attempt", attempt=1),
        event("attempt", attempt=2, from_step=4, fork={"from": "run", "step": 4}),
    ]
    found = lines(*events, attempts=[attempt(1, pid=7), attempt(2, pid=8)])
    assert not [line for line in found if line.startswith("crash")]


def test_an_error_s_text_is_not_repeated():
    events = [
        event("error", text="no memory: none"),
        event("alert", rule="restart", text="no memory: none: restart 1 of 3 from step 4"),
        event("error", text="no memory: none"),
        event("state", state="failed", text="no memory: none"),
    ]
    assert lines(*events)[1::2] == ["restart: restart 1 of 3 from step 4", "state: failed"]


def test_an_engine_that_ended_has_not_died():
    events = [event("attempt", attempt=n) for n in (1, 2)]
    attempts = [attempt(1, pid=7, ended=1.0), attempt(2, pid=8)]
    assert not [line for line in lines(*events, attempts=attempts) if line.startswith("crash")]
