"""The line above the list of samples, and the text in place of an empty list."""

from engine.journal.samples import SampleQuery
from rlhf_tui.screens.parts.sample_filter import keywords
from rlhf_tui.screens.parts.sample_list import ORDER_TITLES, PAGE_SIZE, SampleList
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.lines import Piece, Row, row_width
from rlhf_tui.widgets.samples.sample_view import VIEWS

MIN_FOR_AGREEMENT = 10
"""Least number of judgements for which the agreement is shown; with fewer it is mostly chance."""


def query_line(
    samples: SampleList,
    state: SessionState,
    *,
    cursor: int,
    count: int,
    mode: str,
    full_screen: bool,
    room: int,
) -> list[Piece]:
    """Order, filter and page of the list, and the agreement; in fewer words if they do not fit.

    Args:
        samples: the list.
        state: of its session.
        cursor: the selected row, from 0.
        count: of the rows.
        mode: the view of the selected sample, one of :data:`VIEWS`.
        full_screen: whether that is shown without the list.
        room: cells for the line.
    """
    before: list[Piece] = []
    after: list[Piece] = []
    query = samples.query
    if full_screen:
        before += [(" full screen", "accent"), ("  z back  ", "dim")]
    if query.held_out:
        before += [(" held-out", "accent"), ("  E back  ", "dim")]
    if samples.page or count == PAGE_SIZE:
        after += _page(samples.page, more=count == PAGE_SIZE)
    if query.prompt is not None:
        after += [("   one prompt  ", "accent"), ("= back", "dim")]
    if samples.filter:
        after += [("   only ", "dim"), (samples.filter, "accent")]
    if mode != VIEWS[0]:
        after += [("   tokens: ", "dim"), (mode, "strong")]
    if not query.held_out:
        after += _agreement(state)
    position = f"{cursor + 1}/{count}" if count else ""
    row = [*before, *_order(query, position), *after]
    if row_width(row) <= room:
        return row
    return [*before, *_order(query, position, short=True), *after]


def _order(query: SampleQuery, position: str, *, short: bool = False) -> list[Piece]:
    """The order and the selected row; in the short form as in the title of its column."""
    title = ORDER_TITLES[query.order]
    if short:
        row: list[Piece] = [(" by ", "dim"), (title + ("▾" if query.descending else "▴"), "strong")]
        return [*row, (f"   {position}", "strong")] if position else row
    row = [(" sorted by ", "dim"), (title, "strong")]
    row.append((" descending" if query.descending else " ascending", "dim"))
    return [*row, ("   row ", "dim"), (position, "strong")] if position else row


def _page(number: int, *, more: bool) -> list[Piece]:
    """The number of the page, and the keys for the next and previous ones."""
    row: list[Piece] = [("   page ", "dim"), (str(number + 1), "strong")]
    if number:
        row += [("  , ", "key"), ("previous", "dim")]
    if more:
        row += [("  . ", "key"), ("next", "dim")]
    return row


def _agreement(state: SessionState) -> list[Piece]:
    """How far the scores agree with all judgements of the run."""
    found = state.agreement
    if found.mean is None or len(found.points) < MIN_FOR_AGREEMENT:
        return []
    row: list[Piece] = [
        ("   agrees ", "dim"),
        (f"{found.mean:.0%}", "strong"),
        (f" of {len(found.points):,}", "dim"),
    ]
    if found.fall is not None:
        row.append((f", less from step {found.fall.step:,}", "warn"))
    return row


def not_shown_yet(samples: SampleList, *, live: bool) -> Row:
    """How many samples the list does not show yet; whether it follows a live run."""
    if samples.new.number:
        return [(f"{samples.new.number:,} new", "accent"), ("  F ", "key"), ("show ", "dim")]
    return [("following ", "dim")] if live and samples.following else []


def empty_list(samples: SampleList, state: SessionState) -> list[Row]:
    """Why the list is empty."""
    if samples.filter:
        rows: list[Row] = [
            [(f" no response matches '{samples.filter}'; esc removes the filter", "dim")]
        ]
        if words := keywords(samples.query):
            verb = "is a keyword" if len(words) == 1 else "are keywords"
            text = f" {' and '.join(words)} {verb}; to search for a word, quote it: "
            rows.append([(text, "dim"), (f'"{words[0]}"', "key")])
        return rows
    if samples.query.held_out:
        return [[(" no held-out responses yet; E shows the training responses", "dim")]]
    if not state.head.step:
        return [[(" no responses before the first step is done", "dim")]]
    return [[(" no responses were kept (log.samples)", "dim")]]
