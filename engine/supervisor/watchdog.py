"""Checks a live session every few seconds: telemetry, silent ranks, free disk space."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable

from engine.config.schema import RunConfig
from engine.journal.writer import JournalWriter
from engine.monitoring.guardrails import Alert
from engine.monitoring.telemetry import GpuReader, Sampler
from engine.protocol.client_messages import Gpu, Telemetry
from engine.protocol.rank_messages import FromRank, Phase, RankTimes, Ready
from engine.session.folder import SessionFolder
from engine.supervisor.processes.rank_processes import RankProcesses
from engine.supervisor.server import Server
from engine.supervisor.threads import in_daemon_thread

log = logging.getLogger("engine")

CHECK_INTERVAL = 5.0
"""Seconds between checks."""
CHECKS_PER_ROW = 6
"""The journal keeps the telemetry of one in this many checks."""
CHECKS_OF_FOLDER = 6
"""The run ends if the session's folder is missing in this many checks in a row: a network file
system that is mounted again is away for a moment."""
GPU_TIMEOUT = 10.0
"""Seconds that a check waits for the GPUs' driver. Opening it takes seconds on some machines."""


class Watchdog:
    """A task beside the supervisor that detects problems that no message reports."""

    def __init__(
        self,
        session: SessionFolder,
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
        self._gpus = GpuReader()
        self._reading: asyncio.Future[list[Gpu]] | None = None
        self._driver_is_slow = False
        self._active_alerts: set[str] = set()
        self._times: dict[int, RankTimes] = {}
        self._last_check: float | None = None
        self.latest: Telemetry | None = None
        self.ranks_starting()

    def ranks_starting(self) -> None:
        """Resets the silence of all ranks; call it when ranks are started.

        On one machine rank 0 must connect within `launch.load_silence`. On several, all ranks wait
        for the last machine to join, which torchrun limits.
        """
        self._last_message = {} if self._config.launch.nodes > 1 else {0: time.monotonic()}
        self._loaded: set[int] = set()

    def rank_connected(self, rank: int) -> None:
        """Starts to measure a rank's silence."""
        self._last_message[rank] = time.monotonic()

    def message_received(self, rank: int, message: FromRank) -> None:
        """Ends a rank's silence.

        `launch.load_silence` holds until a rank has loaded. Rank 0 then sends Ready; the others
        show it by the phase of a step.
        """
        self._last_message[rank] = time.monotonic()
        if isinstance(message, Ready) or (isinstance(message, Phase) and not message.loading):
            self._loaded.add(rank)

    def extend_silence(self) -> None:
        """Ends the silence of all connected ranks; call it while none can report.

        Ranks wait for each other: if one cannot send its reports, the others are silent, too.
        """
        self._last_message = dict.fromkeys(self._last_message, time.monotonic())

    def rank_disconnected(self, rank: int) -> None:
        """Stops expecting messages from a rank."""
        self._last_message.pop(rank, None)

    def step_done(self, times: Iterable[RankTimes]) -> None:
        """Stores the duration of a step on each rank for the next telemetry."""
        self._times = {t.rank: t for t in times}

    async def run(
        self, on_silence: Callable[[int, float], None], on_alert: Callable[[Alert], object]
    ) -> None:
        """Checks until cancelled.

        Args:
            on_silence: called with a rank that counts as hung, and its seconds of silence.
            on_alert: called with each condition that begins to hold; its action is `notify`.
        """
        checks, missing, problem = 0, 0, ""
        while True:
            now = time.monotonic()
            self.check_silence(on_silence, now)  # first: it needs neither the disk nor the journal
            missing = 0 if self._journal.is_in_place() else missing + 1
            if missing >= CHECKS_OF_FOLDER:
                self._ranks.kill()  # the end of the attempt says why
            try:
                gpus = await self._read_gpus()
                self.latest = self._sampler.sample(self._ranks.pids, self._times, gpus)
                self._server.send_to_watchers(self.latest)
                if checks % CHECKS_PER_ROW == 0:
                    self._journal.record_telemetry(self.latest)
                self._check_alerts(self.latest, on_alert, now)
                if checks % CHECKS_PER_ROW == 0:
                    problem = ""
            except (OSError, sqlite3.Error) as error:
                # One failed check must not end the task, nor days of a full disk fill the log.
                if problem != (problem := str(error)):
                    log.warning("cannot check the session: %s", problem)
            checks += 1
            await asyncio.sleep(CHECK_INTERVAL)

    async def _read_gpus(self) -> list[Gpu]:
        """Reads the GPUs; none while their driver does not answer.

        Reads in a thread: the supervisor must answer commands, and notice ranks that hang, above
        all when a GPU has failed.
        """
        if self._gpus.has_none:
            return []
        if self._reading is None:
            self._reading = asyncio.ensure_future(in_daemon_thread(self._gpus.read))
        timeout = 0.0 if self._driver_is_slow else GPU_TIMEOUT
        done, _ = await asyncio.wait({self._reading}, timeout=timeout)
        if not done:
            if not self._driver_is_slow:
                log.warning("the GPUs' driver has not answered for %.0f s", GPU_TIMEOUT)
            self._driver_is_slow = True
            return []
        reading, self._reading, self._driver_is_slow = self._reading, None, False
        try:
            return reading.result()
        except RuntimeError as error:  # no thread can be started
            log.debug("the GPUs cannot be read: %s", error)
            return []

    def check_silence(self, on_silence: Callable[[int, float], None], now: float) -> None:
        """Looks for a hung rank once.

        Args:
            on_silence: called with a rank that counts as hung, and its seconds of silence.
            now: from :func:`time.monotonic`, like the times of the ranks' messages.
        """
        self._exclude_absence(now)
        # Ranks that wait for a hung one are silent too: the longest silence is the hung one's.
        hung = [(silence, r) for silence, r in self._silences(now) if silence > self._limit(r)]
        if hung:
            self.ranks_starting()
            silence, rank = hung[0]
            on_silence(rank, silence)

    def _silences(self, now: float) -> list[tuple[float, int]]:
        """Seconds of silence and rank, the longest first."""
        return sorted(((now - t, r) for r, t in self._last_message.items()), reverse=True)

    def _check_alerts(
        self, telemetry: Telemetry, on_alert: Callable[[Alert], object], now: float
    ) -> None:
        rails = self._config.guardrails
        silence, rank = next(iter(self._silences(now)), (0.0, 0))
        free = telemetry.disk_free / 1e9
        text = f"rank {rank} silent for {silence:.0f} s"
        self._alert_once("silent_rank", silence > rails.silent_rank, text, on_alert)
        room = f"{free:.1f} GB" if free >= 0.1 else f"{free * 1000:.0f} MB"
        text = f"{room} free on the session's disk"
        self._alert_once("disk", free < rails.disk_free_gb, text, on_alert)

    def _exclude_absence(self, now: float) -> None:
        """Moves the times of the ranks' last messages forward by the time this process did not run.

        While the supervisor is stopped (SIGSTOP, a frozen container, a stalled file system) it
        reads no messages, but the ranks are not silent. If the whole machine is suspended,
        CLOCK_MONOTONIC stops on Linux, for checks and messages alike.
        """
        if self._last_check is not None:
            absence = max(0.0, now - self._last_check - CHECK_INTERVAL)
            self._last_message = {
                rank: min(now, last + absence) for rank, last in self._last_message.items()
            }
        self._last_check = now

    def _limit(self, rank: int) -> float:
        launch = self._config.launch
        return launch.silence if rank in self._loaded else launch.load_silence

    def _alert_once(
        self, rule: str, holds: bool, text: str, on_alert: Callable[[Alert], object]
    ) -> None:
        """Alerts when a condition begins to hold, but not again while it holds."""
        if not holds:
            self._active_alerts.discard(rule)
        elif rule not in self._active_alerts:
            on_alert(Alert(rule, "notify", text, self._journal.step))
            self._active_alerts.add(rule)  # not before: on a full disk it is tried again
