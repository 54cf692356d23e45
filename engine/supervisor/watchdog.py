"""Looks after a live session every few seconds: telemetry, a silent rank, a nearly full disk."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable

from engine.config.schema import RunConfig
from engine.journal.writer import JournalWriter
from engine.monitoring.guardrails import Alert
from engine.monitoring.telemetry import Sampler
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import FromRank, Phase, RankTimes, Ready
from engine.session.folder import Session
from engine.supervisor.rank_processes import RankProcesses
from engine.supervisor.server import Server

log = logging.getLogger("engine")

CHECK_INTERVAL = 5.0
"""Seconds between looks."""
JOURNAL_EVERY = 6
"""Looks for each row in the journal."""


class Watchdog:
    """Runs beside the supervisor."""

    def __init__(
        self,
        session: Session,
        config: RunConfig,
        journal: JournalWriter,
        server: Server,
        ranks: RankProcesses,
    ) -> None:
        self._config = config
        self._journal = journal
        self._server = server
        self._ranks = ranks
        self._sampler = Sampler(session.folder)
        self._spoke: set[str] = set()
        self._times: dict[int, RankTimes] = {}
        self._checked: float | None = None
        """When the last check was made; None before the first."""
        self.latest: Telemetry | None = None
        self.begin()

    def begin(self) -> None:
        """Ranks are being started; the first of them may take its time, but not for ever.

        With several machines they all wait, for as long as torchrun does, for the last to join.
        """
        self._last = {} if self._config.launch.nodes > 1 else {0: time.monotonic()}
        self._loaded: set[int] = set()

    def opened(self, rank: int) -> None:
        """A rank has said hello."""
        self._last[rank] = time.monotonic()

    def heard(self, rank: int, message: FromRank) -> None:
        """A rank gave a sign of life.

        It loads until it says otherwise: only rank 0 sends a Ready, the others a phase of a step.
        """
        self._last[rank] = time.monotonic()
        if isinstance(message, Ready) or (isinstance(message, Phase) and not message.loading):
            self._loaded.add(rank)

    def gone(self, rank: int) -> None:
        """A rank has hung up: nothing more is expected of it."""
        self._last.pop(rank, None)

    def step_done(self, times: Iterable[RankTimes]) -> None:
        """What the last step took each rank, for the next telemetry."""
        self._times = {t.rank: t for t in times}

    async def run(
        self, on_silence: Callable[[int, float], None], on_alert: Callable[[Alert], None]
    ) -> None:
        """Until cancelled."""
        looks = 0
        while True:
            try:
                self.latest = self._sampler.sample(self._ranks.pids, self._times)
                self._server.show(self.latest)
                if looks % JOURNAL_EVERY == 0:
                    self._journal.record_telemetry(self.latest)
                self.check(self.latest, on_silence, on_alert, time.monotonic())
            except (OSError, sqlite3.Error) as error:
                # A look that fails must not be the last one.
                log.warning("could not look after the session: %s", error)
            looks += 1
            await asyncio.sleep(CHECK_INTERVAL)

    def check(
        self,
        telemetry: Telemetry,
        on_silence: Callable[[int, float], None],
        on_alert: Callable[[Alert], None],
        now: float,
    ) -> None:
        """Checks the disk and the silence of ranks once.

        Args:
            telemetry: the latest reading.
            on_silence: called with a rank that counts as hung, and its seconds of silence.
            on_alert: called with each condition that begins to hold.
            now: from :func:`time.monotonic`, like the times at which ranks sent a message.
        """
        self._exclude_absence(now)
        rails = self._config.guardrails
        # A rank that waits for the others is as silent as the one that hangs: the longest counts.
        since = sorted(((now - t, r) for r, t in self._last.items()), reverse=True)
        silent, rank = since[0] if since else (0.0, 0)
        free = telemetry.disk_free / 1e9
        text = f"look here: no sign of life from rank {rank} for {silent:.0f} s"
        self._speak("silent_rank", silent > rails.silent_rank, text, on_alert)
        text = f"look here: {free:.1f} GB are free where the session lies"
        self._speak("disk", free < rails.disk_free_gb, text, on_alert)
        hung = [(silent, rank) for silent, rank in since if silent > self._limit(rank)]
        if hung:
            self.begin()
            on_silence(hung[0][1], hung[0][0])

    def _exclude_absence(self, now: float) -> None:
        """Moves the ranks' last messages forward by the time this process did not run.

        A supervisor that was stopped (SIGSTOP, a frozen container, a stalled file system) could
        not read what ranks sent meanwhile; their silence would be its own. Where a whole machine
        is suspended, CLOCK_MONOTONIC stands still on Linux, for the checks and for the ranks.
        """
        if self._checked is not None:
            absence = max(0.0, now - self._checked - CHECK_INTERVAL)
            self._last = {rank: min(now, last + absence) for rank, last in self._last.items()}
        self._checked = now

    def _limit(self, rank: int) -> float:
        launch = self._config.launch
        return launch.silence if rank in self._loaded else launch.load_silence

    def _speak(self, rule: str, holds: bool, text: str, on_alert: Callable[[Alert], None]) -> None:
        """Once when it begins to hold."""
        if not holds:
            self._spoke.discard(rule)
        elif rule not in self._spoke:
            self._spoke.add(rule)
            on_alert(Alert(rule, "notify", text, self._journal.step))
