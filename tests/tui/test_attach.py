"""How the terminal app is reached, and where it refuses."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import closing

import pytest
from click.testing import CliRunner

from engine.errors import NoSuchSessionError, UserInputError
from engine.journal.writer import JournalWriter
from engine.session.checkpoints import checkpoint_path, mark_complete
from engine.session.registry import announce
from rlhf_tui.cli import cli
from rlhf_tui.commands import run, view

DEADLINE = 240.0


def attach(*arguments, **options):
    return CliRunner().invoke(view.attach, arguments, standalone_mode=False, **options)


def test_without_a_terminal_it_names_what_to_use_instead(root):
    result = attach("frozen", "--sessions", str(root))
    assert isinstance(result.exception, UserInputError)
    assert result.exception.exit_code == 2
    assert "rlhf-tui status frozen" in str(result.exception)


def test_the_browser_does_so_too(root):
    with pytest.raises(UserInputError, match="rlhf-tui ls"):
        view.browse(root)


def test_an_unknown_session_is_named(root):
    result = attach("nobody", "--sessions", str(root))
    assert isinstance(result.exception, NoSuchSessionError)


def test_without_a_name_and_without_a_live_session_it_says_what_to_do(root, tmp_path):
    result = attach("--sessions", str(root))
    assert "rlhf-tui resume NAME" in str(result.exception)
    result = attach("--sessions", str(tmp_path / "none"))
    assert "rlhf-tui demo" in str(result.exception)


def test_the_only_live_session_is_found_although_it_was_started_elsewhere(
    session_maker, tmp_path, monkeypatch
):
    session = session_maker(tmp_path / "elsewhere", "far", 3)
    opened = []
    monkeypatch.setattr(view, "is_terminal", lambda: True)
    monkeypatch.setattr(view, "open_screen", lambda *given, **_: opened.append(given) or 0)
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path / "here"))
    lock = session.acquire()
    announce(session)
    attach()
    attach("far")
    lock.release()
    assert opened == [(tmp_path / "elsewhere", session)] * 2


@pytest.mark.parametrize("before", [True, False])
def test_with_a_folder_of_sessions_none_of_another_folder_is_opened(
    session_maker, tmp_path, monkeypatch, before
):
    session_maker(tmp_path / "here", "near", 3)
    session = session_maker(tmp_path / "elsewhere", "far", 3)
    monkeypatch.setattr(view, "is_terminal", lambda: True)
    monkeypatch.setattr(view, "open_screen", lambda *_, **__: pytest.fail("a session is opened"))
    folder = ["--sessions", str(tmp_path / "here")]
    lock = session.acquire()
    announce(session)
    for name in ([], ["far"]):
        words = [*folder, "attach", *name] if before else ["attach", *name, *folder]
        result = CliRunner().invoke(cli, words, standalone_mode=False)
        assert isinstance(result.exception, NoSuchSessionError)
    lock.release()


def test_importing_the_app_does_not_import_torch():
    code = "import sys, rlhf_tui.app.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Terminal:
    """The app in a pseudo-terminal."""

    def __init__(self, root, tmp_path, **environment):
        self.master, slave = pty.openpty()
        code = (
            "import sys; from pathlib import Path; from rlhf_tui.app.app import RlhfApp, run_app; "
            "sys.exit(run_app(RlhfApp(Path(sys.argv[1]), 'frozen')))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(root)], stdin=slave, stdout=slave, stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30",
                 **environment},
        )  # fmt: skip
        os.close(slave)
        self.data = b""

    def until(self, seen):
        end = time.monotonic() + DEADLINE
        while not seen():
            assert time.monotonic() < end, self.data[-300:]
            if select.select([self.master], [], [], 0.05)[0]:
                try:
                    self.data += os.read(self.master, 1 << 16)
                except OSError:
                    return


def test_no_color_sends_no_colour(root, tmp_path):
    terminal = Terminal(root, tmp_path, NO_COLOR="1")
    terminal.until(lambda: b"finished" in terminal.data and b"\xe2\xa1" in terminal.data)
    os.write(terminal.master, b"q")
    terminal.until(lambda: terminal.process.poll() is not None)
    codes = re.findall(rb"\x1b\[([0-9;]*)m", terminal.data)
    assert codes
    coloured = [c for c in codes if re.search(rb"(^|;)([34][0-8]|9[0-7]|10[0-7])(;|$)", c)]
    assert coloured == []


def test_the_terminal_is_given_back(root, tmp_path):
    terminal = Terminal(root, tmp_path)
    terminal.until(lambda: b"finished" in terminal.data)
    os.write(terminal.master, b"q")
    terminal.until(lambda: terminal.process.poll() is not None)
    assert terminal.process.wait(DEADLINE) == 0
    for sequence in (b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?1000l"):
        assert sequence in terminal.data


@pytest.mark.parametrize("again", [False, True])
def test_a_fork_that_was_stopped_stays_although_its_source_had_wrong_input(
    session_maker, tmp_path, monkeypatch, again
):
    """Only a fork whose own start fails for its input is removed."""
    source = session_maker(tmp_path / "s", "source", 3)
    wrong = {"text": "no such model"}
    with closing(JournalWriter(source)) as journal:
        journal.record_event("error", wrong, 1)
        journal.set_meta(exit_code=UserInputError.exit_code)
        journal.checkpoints.record(3, 1, 0.0, 0.0)
        journal.checkpoints.complete(3)
    checkpoint = checkpoint_path(source.checkpoints, 3)
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text('{"hashes": {}}')
    mark_complete(checkpoint)

    def start(session, *_args, **_options):
        with closing(JournalWriter(session)) as journal:
            journal.begin_attempt(3, fresh=True)
            if again:
                journal.record_event("error", wrong)
                journal.set_meta(exit_code=UserInputError.exit_code, message="no such model")

    monkeypatch.setattr(run, "is_terminal", lambda: True)
    monkeypatch.setattr(run, "start_engine", start)
    monkeypatch.setattr(view, "open_screen", lambda *_, **__: 0)
    words = ["fork", "source", "--name", "child", "--sessions", str(tmp_path / "s")]
    CliRunner().invoke(cli, [*words, "-o", "train.steps=9"])
    assert (tmp_path / "s" / "child").exists() != again
