"""Formatting of numbers, durations and tables for people."""

import time


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


def number(value: float | None, digits: int = 3) -> str:
    """A metric as `1.234`, `1.20e-04` or `12,345`; `–` for None."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.2e}"


def size(count: float) -> str:
    """Bytes as `1.2 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clock(timestamp: float) -> str:
    """A Unix timestamp as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp))


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
