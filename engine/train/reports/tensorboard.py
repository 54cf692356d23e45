"""Writes TensorBoard event files of a run, in addition to the journal."""

import html
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from engine.config.schema import RunConfig
from engine.metrics import KL, RLHF_REWARD, SCORE
from engine.protocol.rank_messages import Sample
from engine.session.access import make_folders
from engine.train.reports.trackers import shown_config

HEADLINE = (SCORE, KL, RLHF_REWARD)
"""The metrics by which TensorBoard's HParams view compares runs."""
RETRY_SECONDS = 60.0
Notify = Callable[[int, str], None]
"""Called with a step and one line."""


class EventFiles:
    """Writes scalars, the samples as text, and the configuration as hparams.

    They only copy the journal, so a file that cannot be written, such as on a full disk, does not
    end the run. Steps are then left out, and a new file is tried once a minute.
    """

    def __init__(
        self, folder: Path, from_step: int, notify: Notify, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        """Prepares a new event file for this attempt, which the first write creates.

        Args:
            folder: the session's TensorBoard folder.
            from_step: the last completed step. `purge_step` makes the viewer discard what earlier
                attempts wrote for later steps.
            notify: called when files can no longer be written.
            retry_seconds: seconds between two attempts to write a new file.
        """
        self._folder = folder
        self._purge_from = from_step + 1
        """The first step that the files lack, or have from an earlier attempt."""
        self._notify = notify
        self._retry_seconds = retry_seconds
        self._writer: SummaryWriter | None = None
        self._retry_at = 0.0
        self._failed = False

    def hparams(self, config: RunConfig) -> None:
        """Writes the configuration; call it once per run."""
        values = shown_config(config)  # event files are passed around

        def write(writer: SummaryWriter) -> None:
            # Like SummaryWriter.add_hparams, which would also write a scalar for each metric.
            for summary in hparams(values, dict.fromkeys(HEADLINE, 0.0)):
                writer._get_file_writer().add_summary(summary)

        self._try(self._purge_from, write, written=self._purge_from - 1)

    def step(self, step: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        """Writes the scalars and samples of one step, and flushes the file."""

        def write(writer: SummaryWriter) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            if samples:
                writer.add_text("samples", _table(samples), step)

        self._try(step, write, written=step)

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()

    def _try(self, step: int, write: Callable[[SummaryWriter], None], *, written: int) -> None:
        """Writes something and flushes the file. If that fails, reports it and ends the file.

        Args:
            step: the step at which a failure is reported.
            write: writes to the file.
            written: the last step in the files after this.
        """
        if self._writer is None and time.monotonic() < self._retry_at:
            return
        try:
            if self._writer is None:
                _silence_writer_threads()
                make_folders(self._folder)  # SummaryWriter would create it with the umask's mode
                self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_from)
            write(self._writer)
            self._writer.flush()
            self._purge_from = written + 1
        except OSError as error:
            # The writer's thread has ended, and a reader stops at an incomplete record.
            self._writer = None
            self._retry_at = time.monotonic() + self._retry_seconds
            if not self._failed:
                self._notify(step, f"steps are missing in the TensorBoard event files: {error}")
            self._failed = True


def _silence_writer_threads() -> None:
    """Keeps the OSErrors of TensorBoard's writer threads out of the log, now and later.

    A thread hands its error to the next call of its writer, but also raises it, and Python would
    print a traceback a minute while a disk is full.
    """
    previous = threading.excepthook
    if getattr(previous, "func", None) is not _report_exception:
        threading.excepthook = partial(_report_exception, previous)


def _report_exception(
    previous: Callable[[threading.ExceptHookArgs], object], raised: threading.ExceptHookArgs
) -> None:
    of_writer = type(raised.thread).__module__.partition(".")[0] == "tensorboard"
    if not (of_writer and isinstance(raised.exc_value, OSError)):
        previous(raised)


def _with_marks(sample: Sample) -> str:
    """The response, with each reply of an environment between marks."""
    text = sample.response
    for start, end in reversed(sample.replies or ()):
        text = f"{text[:start]}│{text[start:end]}│{text[end:]}"
    return text


def _table(samples: list[Sample]) -> str:
    """Returns a Markdown table. Text is escaped, because the viewer renders HTML in it."""

    def cell(text: str) -> str:
        return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")

    rows = [
        f"| {s.score:.3f} | {s.kl:.3f} | {cell(s.prompt)} | {cell(_with_marks(s))} |"
        for s in samples
    ]
    return "\n".join(["| score | KL | prompt | response |", "|---|---|---|---|", *rows])
