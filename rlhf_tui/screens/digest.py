"""What happened since the operator last looked."""

from rlhf_tui import format as fmt
from rlhf_tui.preferences import Seen
from rlhf_tui.widgets import book as facts
from rlhf_tui.widgets.book import GLYPHS, TONES, Book
from rlhf_tui.widgets.lines import Row

MOST = 8
AWAY = 60.0
"""Seconds under which nobody has been away."""


def digest(book: Book, seen: Seen) -> list[Row]:
    """Lines for a dialog; none where there is nothing to tell."""
    away = book.now() - seen.time
    new = [e for e in book.events if e["event"] > seen.event]
    steps = book.head.step - seen.step
    if away < AWAY or (steps == 0 and not new):
        return []
    rows: list[Row] = [
        [
            ("you were away ", "dim"), (fmt.duration(away), "strong"),
            ("; the run is ", "dim"), (book.head.state, "strong"),
        ]
    ]  # fmt: skip
    if steps > 0:
        rows.append([(f"steps {seen.step} → {book.head.step}", "strong")])
        for name, label in ((facts.SCORE, "score"), (facts.KL, "KL"), (facts.BETA, "beta")):
            series = book.series(name)
            old = series.mean(seen.step - facts.RECENT + 1, seen.step)
            now = series.mean(book.head.step - facts.RECENT + 1, book.head.step)
            rows.append([(f"  {label:<6}", "dim"), (f"{fmt.number(old)} → {fmt.number(now)}", "")])
    elif steps < 0:
        rows.append([(f"the run went back: step {seen.step} → {book.head.step}", "warn")])
    since = [m for m in book.markers() if m.time > seen.time]
    if since:
        rows.append([])
    for marker in since[-MOST:]:
        who = f"  by {marker.who}" if marker.who else ""
        rows.append(
            [
                (f"{marker.step:>6} ", "dim"),
                (f"{GLYPHS[marker.kind]} ", TONES[marker.kind]),
                (marker.text, ""),
                (who, "dim"),
            ]
        )
    if len(since) > MOST:
        rows.append([(f"       and {len(since) - MOST} before these", "dim")])
    states = [e for e in new if e["kind"] in ("state", "error")]
    if states and states[-1].get("text"):
        rows.append([(str(states[-1]["text"]).partition("\n")[0], "warn")])
    return rows
