"""Formatting of numbers, durations, tables and commands for people."""

import math
import time
from typing import Any

from engine.session import command_line
from engine.session.folder import DiskUsage

command = command_line.command
"""A command of rlhf-tui as it can be typed here; the engine's messages use it, too."""


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m10s`, `2h05m` or `3d04h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


WRITTEN_OUT = 1e7
"""A setting below this is written without an exponent, as it is typed: `10000`."""
NUMBER_WIDTH = 7
"""Cells that a number from :func:`number` takes at most."""


def number(value: float | None, digits: int = 3) -> str:
    """A metric in at most :data:`NUMBER_WIDTH` cells; `–` for None.

    Small values keep two significant digits: `1.234`, `0.0042`, `1.20e-4`, `123,456`.

    Args:
        value: any float.
        digits: decimals of a value that is neither very small nor very large.
    """
    if value is None:
        return "–"
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return f"{value + 0.0:.{digits}f}"  # -0.0 has no sign then
    exponent = math.floor(math.log10(size))
    if -3 <= exponent < 0:
        text = f"{value:.{max(digits, 1 - exponent)}f}"
    elif 0 <= exponent < 4:
        text = f"{value:.{min(digits, 4 - exponent)}f}"
    else:
        text = f"{value:,.0f}"
    if exponent >= -3 and len(text) <= NUMBER_WIDTH:
        return text
    # With as many digits as fit, at most three.
    texts = [scientific(value, decimals) for decimals in range(min(digits, 2), -1, -1)]
    return next((text for text in texts if len(text) <= NUMBER_WIDTH), texts[-1])


def with_interval(value: float | None, interval: float | None, digits: int = 2) -> str:
    """A metric with half the width of its confidence interval: `1.71 ± 0.12`."""
    text = number(value, digits)
    return text if interval is None else f"{text} ± {number(interval, digits)}"


def scientific(value: float, decimals: int) -> str:
    """A finite value with a short exponent: `1.12e-4`, `1.2e10`."""
    mantissa, _, exponent = f"{value:.{decimals}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def value_text(value: Any) -> str:
    """Returns a setting's value as short text."""
    if value is None:
        return "off"
    if isinstance(value, bool):
        return str(value).lower()  # as in YAML
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):  # a key without a value is one that was not given
        given = (f"{key}: {value_text(v)}" for key, v in value.items() if v is not None)
        return "{" + ", ".join(given) + "}"
    return str(value)


def _float_text(value: float) -> str:
    text = f"{value:.4g}"
    if "e+" in text and abs(value) < WRITTEN_OUT:
        return f"{value:.0f}"
    mantissa, sign, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if sign else text


def change(key: str, old: Any, new: Any) -> str:
    """A setting's change: `beta 0.1 → 0.2`, or `beta 0.1 unchanged`."""
    if old == new:
        return f"{key} {value_text(new)} unchanged"
    return f"{key} {value_text(old)} → {value_text(new)}"


def size(count: float) -> str:
    """Bytes as `1.2 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def freed(usage: DiskUsage) -> str:
    """The space that deleting a session frees: `frees 1.2 GB`."""
    if usage.freed == usage.size:
        return f"frees {size(usage.size)}"
    return f"frees {size(usage.freed)} of {size(usage.size)}: other sessions have links to the rest"


def clock(timestamp: float) -> str:
    """A Unix timestamp as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp))


def time_of_day(timestamp: float) -> str:
    """A Unix timestamp as local hours and minutes, with the date if it is another day."""
    then, now = time.localtime(timestamp), time.localtime()
    today = then[:3] == now[:3]
    return time.strftime("%H:%M" if today else "%b %d %H:%M", then)


def plural(count: int, noun: str) -> str:
    """`1 sample`, `12 samples`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def aligned(rows: list[list[str]]) -> list[list[str]]:
    """The cells of a table, padded to the widest of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]


def table(rows: list[list[str]], header: list[str]) -> str:
    """Left-aligned columns, as wide as their longest cell."""
    return "\n".join("  ".join(row).rstrip() for row in aligned([header, *rows]))
