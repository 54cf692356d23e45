"""The metrics of the open session, as curves over its steps."""

from engine.metrics import AGREEMENT, EVAL_SCORE
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.series import Series, Smoothed

RECENT_STEPS = 10
"""Steps of `recent_mean`, and of the means before and after an intervention."""


class Curves:
    """Filled by :meth:`take`. A metric that is not read yet may have a downsampled curve."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """The metrics that the journal has, read or not."""
        self.past: dict[str, list[Series]] = {}
        """The curves of abandoned branches, by metric."""
        self._read: dict[str, Series] = {}
        self._downsampled: dict[str, Series] = {}
        self._smoothed: dict[tuple[str, float], Smoothed] = {}
        self._step = 0

    def take(self, update: SessionUpdate) -> None:
        """Adds an update."""
        if update.head is not None:
            self._step = update.head.step
        if update.names is not None:
            self.names = update.names
        self._downsampled |= {n: Series(points) for n, points in update.downsampled.items()}
        for name, points in update.curves.items():
            self._downsampled.pop(name, None)
            self._read.setdefault(name, Series()).extend(points)
        for name, rows in update.past.items():
            by_attempt: dict[int, list[tuple[int, float | None]]] = {}
            for attempt, step, value in rows:
                by_attempt.setdefault(attempt, []).append((step, value))
            self.past[name] = [Series(points) for points in by_attempt.values()]
        if update.agreement is not None:
            self._read[AGREEMENT] = Series(update.agreement.curve)

    def __bool__(self) -> bool:
        """Whether any curve was read; downsampled ones do not count."""
        return bool(self._read)

    def is_read(self, name: str) -> bool:
        """Whether a metric was read, of which there may be no value."""
        return name in self._read

    @property
    def drawable(self) -> list[str]:
        """The names of all metrics that a chart can show."""
        return [*self.names, AGREEMENT] if self.series(AGREEMENT) else self.names

    def series(self, name: str) -> Series:
        """A metric's values; empty where it is unknown."""
        return self._read.get(name) or Series()

    def downsampled(self, name: str) -> Series | None:
        """The shape of a curve that is not read yet; None once it is."""
        return None if name in self._read else self._downsampled.get(name)

    def shape(self, name: str) -> Series:
        """A metric's values, or, until they are read, the downsampled ones."""
        return self.downsampled(name) or self.series(name)

    def smoothed(self, name: str, weight: float) -> Series:
        """A metric's moving average."""
        source = self._read.get(name)
        if source is None or not weight:
            return source or Series()
        found = self._smoothed.get((name, weight))
        if found is None or found.source is not source:
            found = self._smoothed[name, weight] = Smoothed(source, weight)
        found.follow()
        return found

    @property
    def evaluated(self) -> bool:
        """Whether the run has responses to held-out prompts."""
        return bool(self.shape(EVAL_SCORE)) or EVAL_SCORE in self.names

    @property
    def first_step(self) -> int:
        """The first step that charts show: 0 if the run was evaluated before the first step."""
        found = self.shape(EVAL_SCORE)
        return 0 if found and not found.steps[0] else 1

    def recent_mean(self, name: str) -> float | None:
        """The mean of the last steps."""
        return self.series(name).mean(self._step - RECENT_STEPS + 1, self._step)

    def before_and_after(self, name: str, step: int) -> tuple[float | None, float | None]:
        """A metric's mean over the steps before one, and over those from it on."""
        series = self.series(name)
        return series.mean(step - RECENT_STEPS, step - 1), series.mean(
            step, step + RECENT_STEPS - 1
        )
