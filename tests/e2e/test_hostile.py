"""Escape sequences and markup in data never reach the terminal, and crash nothing."""

import json
from contextlib import closing

import pytest

from tests.e2e.terminal import Terminal
from tests.waiting import until

HOSTILE = [
    "steal \x1b]52;c;c3RvbGVu\x07 done",
    "title \x1b]0;owned\x07 done",
    "clear \x1b[2J\x1b[999;999H done",
    "eight-bit \x9b31m\x9d52;c;AAAA\x9c done",
    "turned \u202e around \u2066 done",
    "markup [/nope] [bold] [@click=app.quit]x[/] done",
]
FORBIDDEN = [
    b"\x1b]52;",
    b"\x1b]0;owned",
    b"\x1b[999",
    *(c.encode() for c in "\x9b\x9d\u202e\u2066"),
]


@pytest.fixture(scope="module")
def hostile(either_lab):
    """A paused run with hostile prompts, notes and log lines."""
    lab = either_lab
    prompts = lab.root.with_name("prompts.jsonl")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in HOSTILE))
    run = lab.run("hostile", f"data.prompts={prompts}", steps=1000)
    run.start()
    run.command("pause")
    for text in HOSTILE:
        assert lab.cli("note", run.name, text).returncode == 0
    with run.session.log_file.open("a", encoding="utf-8") as log:
        log.writelines(text + "\n" for text in HOSTILE)
    yield run
    run.end()


def test_the_app_shows_it_as_symbols_and_stays_up(hostile):
    with closing(Terminal(hostile.lab, "attach", hostile.name)) as terminal:
        for key, text in (("2", "Steering"), ("3", "RESPONSE"), ("4", "saved"), ("5", "lines")):
            terminal.type(key)
            until(lambda text=text: text in terminal.text, f"screen {key}")
        terminal.type("1")
        until(lambda: "enter" in terminal.text, "session browser")
        assert terminal.process.poll() is None
        assert not [raw for raw in FORBIDDEN if raw in terminal.raw]


@pytest.mark.parametrize("command", ["samples", "events", "logs", "status"])
def test_the_command_line_prints_it_as_symbols(hostile, command):
    with closing(Terminal(hostile.lab, command, hostile.name)) as terminal:
        until(lambda: terminal.process.poll() is not None, f"end of {command}")
        until(lambda: hostile.name in terminal.text or "done" in terminal.text, "output")
        assert not [raw for raw in FORBIDDEN if raw in terminal.raw]


@pytest.mark.slow
def test_an_error_of_a_reward_function_is_printed_as_symbols(make_lab):
    lab = make_lab("hostile-reward")
    run = lab.run("raises", "reward.retries=0")
    run.score_at(1, "raise " + " ".join(HOSTILE))
    with closing(Terminal(lab, *run.arguments, "--headless")) as terminal:
        until(lambda: "rlhf-tui ctl raises unpause" in terminal.text, "pause")
        assert "ValueError" in lab.cli("status", run.name).stdout
        assert run.command("stop")["status"] == "applied"
        until(lambda: terminal.process.poll() is not None, "end of the run")
        assert not [raw for raw in FORBIDDEN if raw in terminal.raw]
