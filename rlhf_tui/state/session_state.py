"""The state of the open session, assembled from the updates of the feed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.agreement import Agreement
from engine.journal.rows import CheckpointRow, SampleRow
from engine.metrics import (
    BETA,
    CLIP_FRACTION,
    KL,
    PEAK_MEMORY,
    PHASES,
    RESPONSE_LENGTH,
    SCORE,
    STEP_TIME,
    TOKENS_PER_SECOND,
    phase_time,
    with_drawn,
)
from engine.protocol.client_messages import Telemetry
from engine.session.file_signature import FileSignature
from rlhf_tui import format as fmt
from rlhf_tui.state import time_left
from rlhf_tui.state.curves import Curves
from rlhf_tui.state.feeds.updates import ReplayStatus, SessionSummary, SessionUpdate
from rlhf_tui.state.session_timeline import SessionTimeline
from rlhf_tui.state.step_progress import StepProgress

ALWAYS_READ = (
    *with_drawn((SCORE, KL, CLIP_FRACTION, BETA, RESPONSE_LENGTH)),
    STEP_TIME, TOKENS_PER_SECOND, PEAK_MEMORY, *map(phase_time, PHASES),
)  # fmt: skip
"""Metrics that are always read, whichever charts are shown."""


class SessionState:
    """Filled by :meth:`take` and read by the widgets. Use it in the app's thread only.

    The summary, the connection and what the panels list are here; the metrics are :attr:`curves`,
    the events and commands :attr:`timeline`, the phases of the ranks :attr:`progress`.
    """

    def __init__(
        self,
        name: str = "",
        now: Callable[[], float] = time.time,
        root: Path | None = None,
    ) -> None:
        """Creates an empty state.

        Args:
            name: of the session.
            now: the wall clock.
            root: the folder of sessions; None: commands name no folder.
        """
        self.name = name
        self._root = root
        self.batch_size: int | None = None
        """Responses per step; None until the configuration is read."""
        self.best_metric = SCORE
        """The metric by which the best checkpoints are kept."""
        self.keep_last = self.keep_best = 0
        """How many of the newest and of the best checkpoints are kept; 0 until it is read."""
        self.now = now
        self.progress = StepProgress(now)
        self.telemetry: Telemetry | None = None
        self.connected = False
        self.refused = ""
        """Why the engine takes no further viewer; empty if it does."""
        self.problem = ""
        self.stale = ""
        """Why the copy of another machine's session is not kept up to date; empty while it is."""
        self.replay: ReplayStatus | None = None
        """Where the replay is that is shown; None for a session as it is now."""
        self._clear()

    def _clear(self) -> None:
        self.head = SessionSummary("starting", 0, 0, {}, "", [], None, None)
        self.known = False
        """Whether anything was read yet."""
        self.curves = self.progress.curves = Curves()
        self.timeline = SessionTimeline(self.head)
        self.checkpoints: list[CheckpointRow] = []
        self.samples: list[SampleRow] = []
        self.labels: FileSignature = ()
        """Changes whenever somebody labels a response."""
        self.agreement = Agreement()
        """How far the scores agree with the judgements."""

    def take(self, update: SessionUpdate) -> None:
        """Adds an update."""
        if update.replay is not None:
            self.replay = update.replay  # before all else: it is the clock of what follows
        if update.reset:
            self._clear()
        if update.head is not None:
            self.head, self.known = update.head, True
        self.curves.take(update)
        self.timeline.take(update)
        for key in (
            "checkpoints", "samples", "labels", "agreement", "telemetry", "connected", "refused",
            "problem",
        ):  # fmt: skip
            if (value := getattr(update, key)) is not None:
                setattr(self, key, value)
        if update.connected is False:
            self.telemetry = None
        if update.phases is not None:
            self.progress.take(update.phases)

    def command(self, *words: str) -> str:
        """A command of rlhf-tui about this session, as it can be typed once the app is left."""
        return fmt.command(*words, root=self._root)

    @property
    def unread(self) -> str:
        """The text shown for everything that is unknown before the first reading; later empty."""
        if self.known:
            return ""
        return "cannot be read" if self.problem else "reading …"

    @property
    def steps_unread(self) -> bool:
        """Whether there are steps, of which only downsampled curves were read so far."""
        return bool(self.head.step) and not self.curves

    def setting(self, key: str) -> Any:
        """A setting in force, None where unknown."""
        return self.head.settings.get(key)

    @property
    def live(self) -> bool:
        """Whether an engine runs."""
        return self.head.pid is not None

    @property
    def starting(self) -> bool:
        """Whether an engine is loading the models: until then the settings in force are unknown."""
        return self.live and self.head.state == "starting"

    @property
    def waiting(self) -> bool:
        """Whether the engine waits for something from outside: room on the disk, a machine."""
        return self.live and any(phase.waits_for for phase in self.progress.phases)

    def boundary_in(self) -> float | None:
        """Seconds until the current step is done, see :meth:`StepProgress.seconds_left`.

        None if the engine is not training, also while it waits.
        """
        training = self.live and self.head.state in ("running", "pausing", "stopping")
        return self.progress.seconds_left() if training and not self.waiting else None

    def seconds_left(self) -> float | None:
        """Seconds until the end of the run, at the mean of the last steps; None if unknown."""
        seconds, head = self.curves.recent_mean(STEP_TIME), self.head
        if seconds is None or not head.total_steps:
            return None
        return time_left.until_end(head.step, head.total_steps, seconds)
