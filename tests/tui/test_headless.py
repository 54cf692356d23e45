"""What a run in the foreground prints, and that nothing in it controls the terminal."""

import io
import logging
import os
import pty
from pathlib import Path

import pytest

from engine.log_lines import NOTICED
from engine.metrics import BETA, KL, SCORE, STEP_TIME, TOKENS_PER_SECOND
from engine.protocol.rank_messages import Phase, Ready, StepReport
from engine.session.folder import SessionFolder
from rlhf_tui.headless import Printer, PrinterHandler, can_rewrite, print_exception
from rlhf_tui.text import escape_unencodable

RUN = SessionFolder(Path("sessions/run"))
HOSTILE = "\x1b]52;c;c3RvbGVu\x07 \x9b31m \u202e turned"


def hostile_error():
    """An error as a reward function raises it, with its traceback."""
    with pytest.raises(ValueError, match="turned") as caught:
        float(HOSTILE)
    return ValueError(HOSTILE).with_traceback(caught.value.__traceback__)


def print_all(printer):
    """Hostile text on every way to the terminal."""
    log = logging.Logger("engine")
    log.addHandler(PrinterHandler(printer))
    error = hostile_error()
    log.error("%s; restart 1 of 3", HOSTILE)
    log.error("cannot continue", exc_info=error)
    printer.alert(HOSTILE, 3)
    printer.state("stopped", HOSTILE)
    printer.message(Phase(rank=0, step=1, name=HOSTILE))
    printer.message(Ready(info={"notes": [HOSTILE]}, settings={}))
    print_exception(type(error), error, error.__traceback__)


@pytest.mark.parametrize("live", [False, True])
def test_nothing_that_a_terminal_obeys_is_printed(capsys, live):
    print_all(Printer(RUN, 8, live=live))
    out, err = capsys.readouterr()
    for text in (out.replace("\r\x1b[K", ""), err):
        assert not set(text) & set("\x1b\x07\x9b\r\u202e")
    assert "restart 1 of 3" in err
    assert "note: " in err
    assert err.count("Traceback") == 2


def test_lines_are_rewritten_on_a_terminal_that_is_not_dumb(monkeypatch):
    master, slave = pty.openpty()
    with os.fdopen(master, "w"), os.fdopen(slave, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        assert can_rewrite(terminal)
        monkeypatch.setenv("TERM", "dumb")
        assert not can_rewrite(terminal)


def test_what_the_encoding_of_a_locale_lacks_is_printed_as_an_escape(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    escape_unencodable()
    Printer(RUN, 8, live=False).state("stopped", "beta \u2192 0.2 \u00b1 1")
    assert written.getvalue() == b"beta \\u2192 0.2 \xb1 1\n"


def test_only_warnings_and_errors_of_the_log_are_printed(capsys):
    log = logging.Logger("engine")
    log.addHandler(PrinterHandler(Printer(RUN, 8, live=False)))
    log.info("a connection was closed")
    log.warning("notify.command failed")
    log.error("rank 0 was killed; restart 1 of 3", extra=NOTICED)  # printed as a notice
    assert capsys.readouterr() == ("", "notify.command failed\n")


def test_the_tiny_kl_of_the_first_step_is_not_printed_as_zero(capsys):
    values = {SCORE: 0.5, KL: 5.66e-6, BETA: 0.1, STEP_TIME: 1.0, TOKENS_PER_SECOND: 40.0}
    report = StepReport(step=1, metrics=values, samples=[], settings={})
    Printer(RUN, 8, live=False).message(report)
    assert "kl 5.66e-6 " in capsys.readouterr().out


def test_a_pause_names_the_command_that_resumes_this_run(capsys):
    Printer(RUN, 8, live=False).state("paused", "kl_high at step 4: KL 7.26 > 6")
    assert capsys.readouterr().err == "paused; unpause with: rlhf-tui ctl run unpause\n"
