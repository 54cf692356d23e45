"""A run in the foreground: ``python -m rlhf_tui.headless SESSION_FOLDER``.

Runs the supervisor with an observer that prints. `rlhf-tui … --headless` replaces its process by
this one (exec), so that `ps` shows the session's folder. $RLHF_TUI_START is a StartOptions in JSON.
"""

import asyncio
import logging
import os
import shutil
import signal
import sys
from pathlib import Path
from traceback import format_exception
from types import TracebackType
from typing import TextIO

from engine import metrics
from engine.config import file as config_file
from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.launch.failed_start import INTERRUPTED_EXIT, NewSession
from engine.launch.start_options import StartOptions, received_start
from engine.log_lines import is_noticed
from engine.protocol.rank_messages import CheckpointComplete, FromRank, Phase, Ready, StepReport
from engine.session.folder import SessionFolder
from engine.supervisor.serve import supervise
from rlhf_tui import format as fmt
from rlhf_tui.state.time_left import StepSeconds, until_end
from rlhf_tui.text import escape_unencodable, one_line, sanitise


class Printer:
    """The supervisor's observer: prints one line per step, or rewrites one line on a terminal.

    Everything it prints is sanitised.
    """

    def __init__(self, session: SessionFolder, total_steps: int, *, live: bool) -> None:
        """Prints nothing yet.

        Args:
            session: the session of the run.
            total_steps: `train.steps`.
            live: whether stdout is a terminal that can rewrite a line.
        """
        self._session = session
        self._total_steps = total_steps
        self._live = live
        self._closed = False
        self._report: StepReport | None = None
        self._step_seconds = StepSeconds()
        self._phase = ""

    def state(self, state: str, text: str) -> None:
        """Prints the states that the step lines do not show."""
        if state == "stopping":
            self._print_above(
                "stopping: finishing the step and saving (ctrl+c again: stop without saving)"
            )
        elif state == "paused":
            # An alert has been printed with what paused it.
            session = self._session
            unpause = fmt.command("ctl", session.name, "unpause", root=session.folder.parent)
            self._print_above(f"paused; unpause with: {unpause}", sys.stderr)
        elif state in ("finished", "stopped") and text:
            self._print_above(one_line(text))

    def alert(self, text: str, step: int) -> None:
        """Prints an alert."""
        self._print_above(f"step {step}: {one_line(text)}", sys.stderr)

    def log(self, text: str) -> None:
        """Prints a record of the engine's log."""
        self._print_above(text, sys.stderr)

    def message(self, message: FromRank) -> None:
        """Prints a step's summary, a finished checkpoint, or the notes at the start.

        On a terminal, also prints the current phase.
        """
        match message:
            case Phase(rank=0, name=name, done=done, total=total):
                self._phase = one_line(f"{name} {done}/{total}" if total else name)
                self._redraw()
            case Ready(info=info):
                for text in info.get("notes", []):
                    self._print_above(one_line(f"note: {text}"), sys.stderr)
            case StepReport():
                self._show_step(message)
            case CheckpointComplete(step=step):
                self._print_above(f"checkpoint: step {step}")

    def _show_step(self, report: StepReport) -> None:
        self._step_seconds.add(report.metrics[metrics.STEP_TIME])
        self._report = report
        if self._live:
            self._redraw()
        else:
            self._print(self._summary())

    def _summary(self) -> str:
        if self._report is None:
            return ""
        m, step = self._report.metrics, self._report.step
        left = until_end(step, self._total_steps, self._step_seconds.mean or 0)
        return (
            f"step {step}/{self._total_steps}  score {fmt.number(m[metrics.SCORE])}  "
            f"kl {fmt.number(m[metrics.KL])}  beta {fmt.number(m[metrics.BETA], 4)}  "
            f"clip {m.get(metrics.CLIP_FRACTION, 0):.3f}  "
            f"{m[metrics.TOKENS_PER_SECOND]:.0f} tok/s  {fmt.duration(left)} left"
        )

    def _redraw(self) -> None:
        if self._live:
            line = "  ".join(filter(None, (self._summary(), self._phase)))
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{line[:width]}", sys.stdout)

    def _print_above(self, line: str, stream: TextIO | None = None) -> None:
        """Prints a line and redraws the rewritten line below it."""
        if self._live:
            self._write("\r\x1b[K", sys.stdout)
        self._print(line, stream)
        self._redraw()

    def _print(self, line: str, stream: TextIO | None = None) -> None:
        self._write(sanitise(line) + "\n", stream or sys.stdout)

    def _write(self, text: str, stream: TextIO) -> None:
        """Writes text; stops writing after an error, as a closed terminal must not end the run."""
        if self._closed:
            return
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            self._closed = True

    def close(self, session: SessionFolder, code: int) -> None:
        """Prints how the run ended and where its files are."""
        if self._live:
            self._write("\r\x1b[K", sys.stdout)
        with JournalReader(session) as reader:
            meta = reader.meta()
            scores = reader.metrics.series(metrics.SCORE)
        ended = meta.state in ("finished", "stopped")
        if ended and scores:
            span = f"score {fmt.number(scores[0][1])} at step {scores[0][0]}"
            span += f", {fmt.number(scores[-1][1])} at step {scores[-1][0]}"
            self._print(f"{meta.state}: {span}; session {one_line(str(session.folder))}")
        elif code != 0 and not ended:
            self._print(f"rlhf-tui: {one_line(meta.message)}", sys.stderr)


class PrinterHandler(logging.Handler):
    """Prints the engine's warnings and errors through the printer.

    Without a handler, :data:`logging.lastResort` would print records raw, and with them the control
    characters of a reward function's error.
    """

    def __init__(self, printer: Printer) -> None:
        super().__init__(logging.WARNING)
        self._printer = printer

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record, unless its text is printed anyway; called by :mod:`logging`."""
        if not is_noticed(record):
            self._printer.log(self.format(record))


def print_exception(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Prints an uncaught exception without control characters; for :data:`sys.excepthook`."""
    lines = format_exception(kind, error, traceback)
    print(sanitise("".join(lines)), end="", file=sys.stderr)  # noqa: T201


def can_rewrite(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a line can be erased."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def main() -> None:
    """Runs the session to its end and exits with the supervisor's exit code."""
    sys.excepthook = print_exception
    escape_unencodable()
    session = SessionFolder(Path(sys.argv[1]))
    start = received_start()
    new = NewSession(session, start)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by who started it
        total = _total_steps(session, start)
        printer = Printer(session, total, live=can_rewrite(sys.stdout))
        logging.basicConfig(handlers=[PrinterHandler(printer)], format="%(message)s")
        code = asyncio.run(supervise(session, start, printer))
        printer.close(session, code)
    except RlhfError as error:
        print(f"rlhf-tui: {one_line(str(error))}", file=sys.stderr)  # noqa: T201
        code = error.exit_code
    except KeyboardInterrupt:  # before a stop could be asked for, or after the end
        print("rlhf-tui: interrupted", file=sys.stderr)  # noqa: T201
        code = INTERRUPTED_EXIT
    new.remove_if_unused(code)
    _flush()
    sys.exit(code)


def _total_steps(session: SessionFolder, start: StartOptions) -> int:
    return config_file.override(session.config(), start.overrides).train.steps


def _flush() -> None:
    """Flushes stdout; if its pipe is closed, the interpreter's own flush must not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = Path("/dev/null").open("w", encoding="utf-8")  # noqa: SIM115


if __name__ == "__main__":
    main()
