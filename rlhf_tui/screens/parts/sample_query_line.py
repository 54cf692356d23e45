"""The line above the list of samples, and the text in place of an empty list."""

from rlhf_tui.screens.parts.sample_list import ORDER_TITLES, PAGE, SampleList
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.samples.sample_view import VIEWS

AGREEMENT_SHOWN_FROM = 10
"""Judgements below which the agreement is mostly chance."""


def query_line(
    samples: SampleList,
    state: SessionState,
    *,
    cursor: int,
    count: int,
    mode: str,
    full_screen: bool,
) -> list[Piece]:
    """Order, filter and page of the list.

    Args:
        samples: the list.
        state: of its session.
        cursor: the selected row, from 0.
        count: of the rows.
        mode: the view of the selected sample, one of :data:`VIEWS`.
        full_screen: whether that is shown without the list.
    """
    query = samples.query
    row: list[Piece] = []
    if full_screen:
        row += [(" full screen", "accent"), ("  z back  ", "dim")]
    if query.held_out:
        row += [(" held-out", "accent"), ("  E back  ", "dim")]
    row += [(" sorted by ", "dim"), (ORDER_TITLES[query.order], "strong")]
    row.append((" descending" if query.descending else " ascending", "dim"))
    if count:
        row += [("   row ", "dim"), (f"{cursor + 1}/{count}", "strong")]
    if samples.page or count == PAGE:
        row += _page(samples.page, more=count == PAGE)
    if query.prompt is not None:
        row += [("   one prompt  ", "accent"), ("= back", "dim")]
    if samples.filter:
        row += [("   only ", "dim"), (samples.filter, "accent")]
    if mode != VIEWS[0]:
        row += [("   tokens: ", "dim"), (mode, "strong")]
    return row if query.held_out else row + _agreement(state)


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
    if found.mean is None or len(found.points) < AGREEMENT_SHOWN_FROM:
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
    if samples.new:
        return [(f"{samples.new:,} new", "accent"), ("  F ", "key"), ("show ", "dim")]
    return [("following ", "dim")] if live and samples.following else []


def empty_list(samples: SampleList, state: SessionState) -> list[Row]:
    """Why the list is empty."""
    if samples.filter:
        return [[(f" no response matches '{samples.filter}'; esc removes the filter", "dim")]]
    if samples.query.held_out:
        return [[(" no held-out responses yet; E shows those of training", "dim")]]
    if not state.head.step:
        return [[(" no responses before the first step is done", "dim")]]
    return [[(" no responses were kept (log.samples)", "dim")]]
