"""The main metrics at the start and at the end of a run."""

from collections.abc import Iterable

from msgspec import Struct

from engine.journal.reader import JournalReader
from engine.metrics import (
    BETA,
    ENTROPY,
    EVAL_KL,
    EVAL_SCORE,
    EVAL_SCORE_CI,
    KL,
    RESPONSE_LENGTH,
    SCORE,
    STEP_TIME,
    title_of,
)

HEADLINES = (SCORE, KL, BETA, RESPONSE_LENGTH, ENTROPY, STEP_TIME)
HELD_OUT = (EVAL_SCORE, EVAL_KL)
STEPS_AVERAGED = 10
"""Number of steps in the means at the start and at the end of a run, as in the dashboard; at most
half of the run each, so that the two means of a short run differ."""


class Headline(Struct, frozen=True):
    """A metric at the start and at the end."""

    title: str
    first: float | None
    last: float | None
    half_widths: tuple[float | None, float | None] = (None, None)
    """Half the widths of the 95 % intervals of `first` and `last`."""
    steps: tuple[int, int] | None = None
    """The steps of the two values; None for means of :data:`STEPS_AVERAGED` steps."""


def read_headlines(reader: JournalReader, last_step: int) -> list[Headline]:
    """The headlines of training, for the metrics that the run has."""
    found = [_headline(reader, name, last_step) for name in HEADLINES]
    return [headline for headline in found if headline is not None]


def read_held_out(reader: JournalReader, last_step: int) -> list[Headline]:
    """The headlines of the evaluation on held-out prompts; empty without one."""
    found = [_held_out(reader, name, last_step) for name in HELD_OUT]
    return [headline for headline in found if headline is not None]


def _headline(reader: JournalReader, name: str, last: int) -> Headline | None:
    steps = max(1, min(STEPS_AVERAGED, last // 2))
    first = mean_of_known(value for _, value in reader.metrics.series(name, 0, steps))
    end = mean_of_known(value for _, value in reader.metrics.series(name, last - steps, last))
    return None if first is None and end is None else Headline(title_of(name), first, end)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _held_out(reader: JournalReader, name: str, until: int) -> Headline | None:
    series = reader.metrics.series(name, until=until)
    points = [(step, value) for step, value in series if value is not None]
    if not points:
        return None
    (first_step, first), (last_step, last) = points[0], points[-1]
    widths = dict(reader.metrics.series(EVAL_SCORE_CI, until=until)) if name == EVAL_SCORE else {}
    both = widths.get(first_step), widths.get(last_step)
    return Headline(title_of(name), first, last, both, (first_step, last_step))
