"""Posts the updates of a past session, in the order and at the pace of a player."""

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable

import msgspec
from msgspec import Struct

from engine.errors import JournalError, RlhfError
from engine.journal.history.recording import Recording
from engine.journal.judgements.labels import LabelReader
from engine.journal.reader import JournalReader
from engine.metrics import PHASES, phase_time
from engine.protocol.client_messages import Telemetry
from engine.protocol.rank_messages import Phase
from engine.session.folder import SessionFolder
from engine.session.states import LIVE_STATES
from rlhf_tui.state.feeds.journal_changes import JournalChanges
from rlhf_tui.state.feeds.output import Post, UpdateOutput
from rlhf_tui.state.feeds.updates import ReplayMark, ReplayStatus, SessionUpdate
from rlhf_tui.state.replay.player import Player
from rlhf_tui.state.timeline import Marker, timeline

FRAME_INTERVAL = 0.25
"""Seconds between two readings while it plays."""
WITHOUT_PHASES = ("starting", "paused")
"""States in which no step is running."""
STALE_SECONDS = 60.0
"""Seconds after which a reading of the machine is not shown any more."""
SKIP_SECONDS = 1.0
"""Seconds of playing after a marker during which the key for the previous marker skips it."""


class PlacedMarker(Struct, frozen=True):
    """A marker and when a replay reaches it."""

    offset: float
    marker: Marker


class ReplayFeed:
    """Reads a session up to a moving moment. Nothing can be sent to the session."""

    def __init__(
        self,
        session: SessionFolder,
        player: Player,
        names: Iterable[str],
        post: Post,
        from_step: int,
    ) -> None:
        """Starts nothing yet.

        Args:
            session: the session to replay.
            player: the clock; set to `from_step` when the recording has been read.
            names: metrics to read; :meth:`want` adds to them.
            post: called with each update, from another thread.
            from_step: the step of today's timeline at whose end the replay begins.
        """
        self._session = session
        self._player = player
        self._from_step = from_step
        self._status: ReplayStatus | None = None
        self._output = UpdateOutput(
            lambda update: post(msgspec.structs.replace(update, replay=self._status))
        )
        self._changes = JournalChanges(names, self._output)
        self._recording: Recording | None = None
        self._marks: tuple[ReplayMark, ...] = ()
        self._wanted_more = False
        self._shown: tuple[float, float, bool] | None = None
        """Offset, speed and whether it played at the last reading."""
        self._phase_times: tuple[int, dict[str, float]] = (0, {})
        """A step, and the seconds of its phases."""
        self.markers: tuple[PlacedMarker, ...] = ()
        """All but checkpoints, in the order in which they are reached."""

    def start(self) -> None:
        """Starts the thread. It is a daemon: it ends with the process."""
        threading.Thread(target=self._play, daemon=True, name="replay").start()

    def read_all(self) -> None:
        """Reads once, in the calling thread."""
        self._read_once()

    def stop(self) -> None:
        """Posts no more updates."""
        self._output.stopped.set()
        self._player.changed.set()

    def want(self, names: Iterable[str]) -> None:
        """Also reads these metrics from now on."""
        self._changes.want(names)
        self._wanted_more = True
        self._player.changed.set()

    def jump(self, way: int) -> Marker | None:
        """Moves to the next marker (1) or the previous one (-1) and returns it; None if none."""
        offsets = [placed.offset for placed in self.markers]
        now, speed, playing = self._player.read()
        if way > 0:
            index = bisect_right(offsets, now)
        else:
            # While it plays it has moved on since: the key would lead to the same one forever.
            moved = SKIP_SECONDS * speed if playing else 0.0
            index = bisect_left(offsets, now - moved) - 1
        if not 0 <= index < len(offsets):
            return None
        self._player.seek(offsets[index])
        return self.markers[index].marker

    # -- in the thread -------------------------------------------------------------------------

    def _play(self) -> None:
        while not self._output.stopped.is_set():
            self._player.changed.clear()
            self._read_once()
            self._player.changed.wait(
                FRAME_INTERVAL if self._shown is None or self._shown[2] else None
            )

    def _read_once(self) -> None:
        try:
            if self._recording is None:
                self._load()
            self._read_up_to_now()
        except (RlhfError, OSError) as error:
            self._output.report(str(error))
        else:
            self._output.report("")

    def _load(self) -> None:
        """Reads what there is to replay."""
        recording = Recording(self._session)
        if not len(recording):
            raise JournalError(f"'{self._session.name}' has recorded nothing yet to replay")
        with JournalReader(self._session) as reader:
            self.markers = _placed(reader, recording)
        self._player.load(recording.duration, recording.offset_of_step(self._from_step))
        self._recording = recording
        whole = recording.duration or 1.0
        self._marks = tuple(ReplayMark(p.offset / whole, p.marker.kind) for p in self.markers)

    def _read_up_to_now(self) -> None:
        """Posts what is new since the last reading, or all of it after a move backwards."""
        recording, shown = self._recording, self._player.read()
        if recording is None or (shown == self._shown and not self._wanted_more):
            return
        self._wanted_more = False
        offset, speed, playing = shown
        position = recording.position_at(offset)
        back = self._shown is not None and offset < self._shown[0]
        self._shown = shown
        self._status = ReplayStatus(
            position=position,
            share=offset / recording.duration if recording.duration else 1.0,
            last_step=recording.last_step,
            speed=speed,
            playing=playing,
            marks=self._marks,
        )
        if back:
            self._changes.reset()
            self._output.post(SessionUpdate(reset=True))
        session = self._session.at(position)
        with JournalReader(session) as reader, LabelReader(session) as labels:
            live = self._live_state(reader, offset)
            self._changes.read(session, reader, (labels.count(),), live)

    def _live_state(self, reader: JournalReader, offset: float) -> SessionUpdate:
        """The live data that an engine would have sent."""
        position = reader.session.position
        if position is None or not position.live:
            return SessionUpdate(phases=[], connected=False)
        return SessionUpdate(
            phases=self._phases(reader, offset),
            telemetry=_fresh(reader.last_telemetry(), position.time),
            connected=True,
        )

    def _phases(self, reader: JournalReader, offset: float) -> list[Phase]:
        """The phase at an offset: a step's phases lie at the end of the time it took."""
        state = reader.meta().state
        if self._recording is None or state in WITHOUT_PHASES or state not in LIVE_STATES:
            return []
        found = self._recording.next_step(offset)
        if found is None:
            return []
        step, _, ends = found
        now = self._recording.time_at(offset)
        seconds = self._seconds_of(step)
        begins = ends - sum(seconds.values())
        for name, took in seconds.items():
            if now < begins + took or name == list(seconds)[-1]:
                return [Phase(rank=0, step=step, name=name)]
            begins += took
        return []

    def _seconds_of(self, step: int) -> dict[str, float]:
        """The seconds of each phase of a step, in order."""
        if self._phase_times[0] != step:
            with JournalReader(self._session) as reader:
                times = {n: reader.metrics.value_at(phase_time(n), step) for n in PHASES}
            seconds = {n: value for n, value in times.items() if value}
            self._phase_times = step, seconds
        return self._phase_times[1]


def _placed(reader: JournalReader, recording: Recording) -> tuple[PlacedMarker, ...]:
    markers = timeline(
        reader.events(), reader.commands(), reader.attempts(), reached={},
        crashed_at=reader.last_step() if reader.state() == "crashed" else None,
    )  # fmt: skip
    placed = [
        PlacedMarker(_offset_of(marker, recording), marker)
        for marker in markers
        if marker.kind not in ("checkpoint", "end")
    ]
    return tuple(sorted(placed, key=lambda p: p.offset))


def _offset_of(marker: Marker, recording: Recording) -> float:
    kind, _, number = marker.key.partition("-")
    if kind == "died":
        return recording.offset_of_end(int(number))
    if marker.key.startswith("e"):
        # A command is marked when it is applied, some time after its event.
        after = marker.time if marker.kind == "command" else 0.0
        return recording.offset_of_event(int(marker.key[1:]), after)
    return recording.offset_of_time(marker.time)


def _fresh(telemetry: Telemetry | None, now: float) -> Telemetry | None:
    return telemetry if telemetry is not None and now - telemetry.time < STALE_SECONDS else None
