"""The heat strip: maps tokens' values to tones. The legend and the tokens share one scale."""

import math
from collections.abc import Sequence

from msgspec import Struct

from rlhf_tui import format as fmt
from rlhf_tui.widgets.lines import Row, flowed

HEAT = ("", "heat1", "heat2", "heat3")
COLD = ("", "cold1", "cold2", "cold3")
UNDEFINED = "bad"
"""The tone of values that are not finite."""
TICKS = (-0.625, -0.375, 0.0, 0.375, 0.625)
"""Values in the legend between the lowest and the highest, as shares of the scale: one a tone."""


class HeatScale(Struct, frozen=True):
    """Maps values to tones by their distance from a centre."""

    low: float
    """The lowest finite value; NaN if there is none."""
    high: float
    centre: float
    half: float
    """Half of the largest distance of a value from the centre; positive. The whole one may be too
    large for a float."""

    @classmethod
    def of(cls, values: Sequence[float], *, centred: bool = False) -> "HeatScale":
        """The scale of the finite ones of some values.

        Args:
            values: of the tokens of one response.
            centred: whether the centre is the mean instead of 0, for values of similar size, which
                would otherwise all have the same tone.
        """
        finite = [v for v in values if math.isfinite(v)]
        if not finite:
            return cls(math.nan, math.nan, 0.0, 0.5)
        centre = sum(v / len(finite) for v in finite) if centred else 0.0
        half = max(abs(v / 2 - centre / 2) for v in finite) or 0.5
        return cls(min(finite), max(finite), centre, half)

    def share(self, value: float) -> float:
        """The position of a finite value, from -1 to 1, with 0 at the centre."""
        return (value / 2 - self.centre / 2) / self.half

    def tone(self, value: float) -> str:
        """The tone of a value."""
        if not math.isfinite(value):
            return UNDEFINED
        share = self.share(value)
        return (HEAT if share >= 0 else COLD)[min(3, int(4 * abs(share)))]

    def legend(self, width: int) -> list[Row]:
        """The scale: values from the lowest to the highest, each in its tone, in `width` cells."""
        if math.isnan(self.low):
            return [[("– … –", UNDEFINED)]]
        inner = [self.centre + tick * 2 * self.half for tick in TICKS]
        values = [self.low, *(v for v in inner if self.low < v < self.high), self.high]
        texts: dict[str, str] = {}
        for value in values:
            # Adding 0.0 makes a rounded -0.0 a plain 0; the ends come before values equal to them.
            texts.setdefault(fmt.number(round(value, 2) + 0.0, 2), self.tone(value))
        shown: list[Row] = [[(f" {text} ", tone)] for text, tone in texts.items()]
        rows = flowed([[("scale ", "dim")], *shown], width, "")
        if len(rows) == 1:
            return rows
        tight = flowed([[(f"{text} ", tone)] for text, tone in texts.items()], width, "")
        return tight if len(tight) == 1 else rows
