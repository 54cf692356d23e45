"""A response of several turns: the policy's words, and the replies of its environment between them.

Replies have a mark in a column of its own, where the policy's words never are. So a policy that
writes as if it were its user is not mistaken for one, with and without colours.
"""

from collections.abc import Callable, Sequence

from engine.journal.turns import turns_of
from rlhf_tui.text import sanitise
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.samples.diff import marked_lines, words_of
from rlhf_tui.widgets.wrap import wrap

Replies = Sequence[tuple[int, int]] | None
"""Start and end of each reply in a response, in characters, as samples have them."""
MARK = "│ "
INDENT: Piece = (" " * len(MARK), "")
LEGEND: Piece = (f"{MARK}reply", "dim")


def heading(replies: Replies) -> Row:
    """The heading of a response, with the mark if it has replies."""
    title: Piece = ("RESPONSE", "dim")
    return [title, ("   ", ""), LEGEND] if replies else [title]


def response_rows(response: str, replies: Replies, width: int) -> list[Row]:
    """A response in lines of at most `width` cells, each reply on lines of its own."""
    return _rows(
        response, replies, width, lambda text, room: [[(line, "")] for line in wrap(text, room)]
    )


def marked_response_rows(
    response: str, replies: Replies, marked_words: set[int], tone: str, width: int
) -> list[Row]:
    """The same, with some of the policy's words in a tone.

    Args:
        response: the whole text.
        replies: in it.
        marked_words: positions among the words of :func:`own_text`.
        tone: of the marked words.
        width: cells.
    """
    before = 0

    def lines(text: str, room: int) -> list[Row]:
        nonlocal before
        marked = {word - before for word in marked_words if word >= before}
        before += len(words_of(text))
        return marked_lines(text, marked, tone, room)

    return _rows(response, replies, width, lines)


def _rows(
    response: str, replies: Replies, width: int, lines: Callable[[str, int], list[Row]]
) -> list[Row]:
    """The lines of a response; `lines` breaks a turn of the policy into lines of some cells."""
    if not replies:
        return lines(response, width)
    rows: list[Row] = []
    for turn in turns_of(response, replies):
        if turn.is_reply:
            rows += reply_rows(turn.text, width)
        else:
            rows += [[INDENT, *line] for line in lines(turn.text, width - len(MARK))]
    return rows


def reply_rows(reply: str, width: int) -> list[Row]:
    """A reply in lines of at most `width` cells, each with the mark."""
    return [[(MARK + line, "dim")] for line in wrap(reply.strip("\n"), width - len(MARK))]


def own_text(response: str, replies: Replies) -> str:
    """The sanitised text of the policy alone, each turn on lines of its own."""
    return "\n".join(sanitise(t.text) for t in turns_of(response, replies) if not t.is_reply)


def reply_texts(response: str, replies: Replies) -> list[str]:
    """The texts of the replies."""
    return [turn.text for turn in turns_of(response, replies) if turn.is_reply]


def on_one_line(response: str, replies: Replies) -> list[Piece]:
    """A response for a line of a list: each reply is dim, and between two marks."""
    mark = MARK.strip()
    pieces = [
        (f" {mark}{turn.text.strip()}{mark} ", "dim") if turn.is_reply else (turn.text.strip(), "")
        for turn in turns_of(response, replies)
    ]
    return [piece for piece in pieces if piece[0]]
