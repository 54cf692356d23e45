"""The export of preferences: pairs of a chosen and a rejected response to the same prompt.

The columns `prompt`, `chosen` and `rejected` are those that trainers such as TRL's DPO read: texts,
or lists of messages if the responses are conversations with an environment. Further columns hold
the operator, the time, and the origin of each response and of its parts.
"""

from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from engine.errors import SessionError
from engine.journal.judgements.labels import JudgedResponse, LabelReader, Response
from engine.journal.judgements.recorded_conversation import (
    RecordedConversation,
    conversations_of_reference,
)
from engine.journal.samples import SampleReader
from engine.session.folder import SessionFolder

REJECTED_LABELS = ("bad", "hack")


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True):
    """One row of an export; the fields are the columns, in order."""

    prompt: str | list[dict[str, str]]
    chosen: str | list[dict[str, str]]
    rejected: str | list[dict[str, str]]
    source: str
    """`pair`: from a comparison of the two; `labels`: from the labels of each."""
    who: str
    time: float
    chosen_attempt: int | None
    """Attempt, step and index are None for a response of the reference."""
    chosen_step: int | None
    chosen_index: int | None
    rejected_attempt: int | None
    rejected_step: int | None
    rejected_index: int | None
    chosen_replies: list[tuple[int, int]] | None
    """Start and end of each reply of an environment in the response, in characters. None without an
    environment, in a list of messages, and if the response is not recorded any more."""
    rejected_replies: list[tuple[int, int]] | None


@dataclass(frozen=True)
class ExportedPairs:
    """The pairs of a session."""

    pairs: list[PreferencePair]
    left_out: int = 0
    """Pairs of which only the text is recorded, while those of the others are messages."""


def preference_pairs(session: SessionFolder) -> ExportedPairs:
    """All preference pairs of a session, each once, in the order of the judgements.

    A pair is either a recorded preference (`source` "pair"), or a response labelled good and one
    labelled bad or hack to the same prompt ("labels"). For the same two responses, a recorded
    preference takes precedence over labels, and a later judgement over an earlier one.

    Raises:
        SessionError: there is no pair; the message explains how to make one.
        JournalError: the judgements or the responses cannot be read.
    """
    with LabelReader(session) as labels:
        preferences, judged = labels.preferences(), list(labels.judgements().values())
    rows = [
        (p.order, _Pair("pair", p.prompt, p.chosen, p.rejected, p.who, p.time)) for p in preferences
    ]
    rows += _labelled(judged)
    if not rows:
        raise SessionError(_no_pairs(session, judged))
    unique: dict[tuple[str, frozenset[str]], tuple[float, _Pair]] = {}
    for order, row in sorted(rows, key=lambda r: (r[1].source != "pair", -r[0])):
        texts = frozenset((row.chosen.response, row.rejected.response))
        unique.setdefault((row.prompt, texts), (order, row))
    return _exported(session, [row for _, row in sorted(unique.values(), key=lambda r: r[0])])


@dataclass(frozen=True)
class _Pair:
    source: str
    prompt: str
    chosen: Response
    rejected: Response
    who: str
    time: float


def _labelled(judged: list[JudgedResponse]) -> list[tuple[float, _Pair]]:
    """The pairs that follow from labels, each with the order of its later label."""
    worse: dict[str, list[JudgedResponse]] = {}
    for response in judged:
        if response.judgement.label in REJECTED_LABELS:
            worse.setdefault(response.prompt, []).append(response)
    return [
        (
            max(good.order, bad.order),
            _Pair(
                "labels", good.prompt, good.response, bad.response,
                " and ".join(dict.fromkeys((good.judgement.who, bad.judgement.who))),
                max(good, bad, key=lambda j: j.order).judgement.time,
            ),
        )
        for good in judged
        if good.judgement.label == "good"
        for bad in worse.get(good.prompt, ())
        if good.response.response != bad.response.response
    ]  # fmt: skip


def _exported(session: SessionFolder, pairs: list[_Pair]) -> ExportedPairs:
    """The rows of pairs; those of conversations are messages if any of the pairs has them."""
    with SampleReader(session) as samples:
        found = {
            Response.of(row): RecordedConversation(row.replies, row.messages)
            for row in samples.judged()
        }
    probed = conversations_of_reference(
        session, {p.prompt for p in pairs if None in (p.chosen.attempt, p.rejected.attempt)}
    )

    def recorded(pair: _Pair, response: Response) -> RecordedConversation:
        if response.attempt is None:
            return probed.get((pair.prompt, response.response), RecordedConversation())
        return found.get(response, RecordedConversation())

    of_pairs = [(p, recorded(p, p.chosen), recorded(p, p.rejected)) for p in pairs]
    rows = [_row(*of_pair) for of_pair in of_pairs]
    as_messages = [
        replace(
            row, prompt=chosen.messages.prompt, chosen=chosen.messages.response,
            rejected=rejected.messages.response, chosen_replies=None, rejected_replies=None,
        )
        for row, (_, chosen, rejected) in zip(rows, of_pairs, strict=True)
        if chosen.messages is not None and rejected.messages is not None
    ]  # fmt: skip
    if as_messages:
        return ExportedPairs(as_messages, len(rows) - len(as_messages))
    return ExportedPairs(rows)


def _row(
    pair: _Pair, chosen: RecordedConversation, rejected: RecordedConversation
) -> PreferencePair:
    one, other = pair.chosen, pair.rejected
    return PreferencePair(
        prompt=pair.prompt, chosen=one.response, rejected=other.response, source=pair.source,
        who=pair.who, time=pair.time, chosen_attempt=one.attempt, chosen_step=one.step,
        chosen_index=one.index, rejected_attempt=other.attempt,
        rejected_step=other.step, rejected_index=other.index,
        chosen_replies=chosen.replies, rejected_replies=rejected.replies,
    )  # fmt: skip


def _no_pairs(session: SessionFolder, judged: list[JudgedResponse]) -> str:
    state = "judgements but no pair of responses to one prompt" if judged else "no preferences yet"
    return (
        f"session '{session.name}' has {state}: on screen 3 of {session.command('attach')}, "
        "compare a response with another one (d) and choose the better one (y, o), or label "
        "responses to one prompt good (+) and bad (-)"
    )
