"""A run in the foreground: ``python -m rlhf_tui.headless SESSION_FOLDER START``.

The supervisor's coroutine with an observer that prints. `rlhf-tui … --headless` becomes this
process (exec), so that `ps` shows the session's folder.
"""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import TextIO

import msgspec

from engine import metrics
from engine.config import file as config_file
from engine.errors import RlhfError
from engine.journal.reader import JournalReader
from engine.launch.start import StartOptions
from engine.protocol.rank_messages import CheckpointComplete, FromRank, Phase, StepReport
from engine.session.folder import Session
from engine.supervisor.supervisor import supervise
from rlhf_tui import format as fmt
from rlhf_tui.state.time_left import StepSeconds, until_end
from rlhf_tui.text import one_line


class Printer:
    """Prints a run: one plain line a step, or a line that is rewritten on a terminal."""

    def __init__(self, total_steps: int, *, live: bool) -> None:
        self._total = total_steps
        self._live = live
        self._closed = False
        self._step: StepReport | None = None
        self._step_seconds = StepSeconds()
        self._phase = ""

    def state(self, state: str, text: str) -> None:
        """Announces a state in words, where it is not plain from the lines."""
        if state == "stopping":
            self._say("stopping: finishing the step and saving (ctrl+c again: stop without saving)")
        elif state == "paused":
            self._say("paused; resume with: rlhf-tui ctl NAME unpause", sys.stderr)
        elif state in ("finished", "stopped") and text:
            self._say(one_line(text))

    def alert(self, text: str, step: int) -> None:
        """A guard rail, or the engine, wants a look."""
        self._say(f"step {step}: {one_line(text)}", sys.stderr)

    def message(self, message: FromRank) -> None:
        """Prints what a rank said, if it is for people."""
        match message:
            case Phase(rank=0, name=name, done=done, total=total):
                self._phase = f"{name} {done}/{total}" if total else name
                self._redraw()
            case StepReport():
                self._take(message)
            case CheckpointComplete(step=step):
                self._say(f"checkpoint: step {step}")

    def _take(self, report: StepReport) -> None:
        self._step_seconds.add(report.metrics[metrics.STEP_TIME])
        self._step = report
        if self._live:
            self._redraw()
        else:
            self._print(self._summary())

    def _summary(self) -> str:
        if self._step is None:
            return ""
        m, step = self._step.metrics, self._step.step
        left = until_end(step, self._total, self._step_seconds.mean or 0)
        return (
            f"step {step}/{self._total}  score {m[metrics.SCORE]:.3f}  "
            f"kl {m[metrics.KL]:.3f}  beta {fmt.number(m[metrics.BETA], 4)}  "
            f"clip {m.get(metrics.CLIP_FRACTION, 0):.3f}  "
            f"{m[metrics.TOKENS_PER_SECOND]:.0f} tok/s  {fmt.duration(left)} left"
        )

    def _redraw(self) -> None:
        if self._live:
            line = "  ".join(filter(None, (self._summary(), self._phase)))
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\x1b[K{line[:width]}", sys.stdout)

    def _say(self, line: str, stream: TextIO | None = None) -> None:
        if self._live:
            self._write("\r\x1b[K", sys.stdout)
        self._print(line, stream)
        self._redraw()

    def _print(self, line: str, stream: TextIO | None = None) -> None:
        self._write(line + "\n", stream or sys.stdout)

    def _write(self, text: str, stream: TextIO) -> None:
        """A closed terminal or pipe must not end the training that goes on behind it."""
        if self._closed:
            return
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            self._closed = True

    def close(self, session: Session, code: int) -> None:
        """The last words: how it ended and where to look."""
        if self._live:
            self._write("\r\x1b[K", sys.stdout)
        with JournalReader(session) as record:
            meta = record.meta()
            scores = record.series(metrics.SCORE)
        if code == 0 and scores:
            span = f"score {fmt.number(scores[0][1])} at step {scores[0][0]}"
            span += f", {fmt.number(scores[-1][1])} at step {scores[-1][0]}"
            self._print(f"{meta.state}: {span}; session {one_line(str(session.folder))}")
        elif code != 0:
            self._print(f"rlhf-tui: {one_line(meta.message)}", sys.stderr)


def main() -> None:
    """Runs to the end and exits with the contract's codes."""
    session = Session(Path(sys.argv[1]))
    start = msgspec.json.decode(sys.argv[2], type=StartOptions)
    new = bool(start.origin) or not session.journal_file.exists()
    try:
        printer = Printer(_total(session, start), live=sys.stdout.isatty())
        code = asyncio.run(supervise(session, start, printer))
        printer.close(session, code)
    except RlhfError as error:
        print(f"rlhf-tui: {one_line(str(error))}", file=sys.stderr)  # noqa: T201
        code = error.exit_code
    if code == 2 and new:
        # Nothing was trained yet: a mistake in the input leaves nothing half-made behind.
        shutil.rmtree(session.folder, ignore_errors=True)
    _flush()
    sys.exit(code)


def _total(session: Session, start: StartOptions) -> int:
    return config_file.override(session.config(), start.overrides).train.steps


def _flush() -> None:
    """Ends quietly where nobody reads any more."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = Path("/dev/null").open("w", encoding="utf-8")  # noqa: SIM115


if __name__ == "__main__":
    main()
