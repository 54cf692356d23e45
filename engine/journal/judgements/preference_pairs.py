"""The export of preferences: pairs of a chosen and a rejected response to the same prompt.

The columns `prompt`, `chosen` and `rejected` are those that trainers such as TRL's DPO read.
Further columns hold the operator, the time, and the origin of each response and of its parts.
"""

import msgspec

from engine.errors import SessionError
from engine.journal.judgements.labels import JudgedResponse, LabelReader, Response
from engine.journal.samples import SampleReader
from engine.session.folder import SessionFolder

WORSE = ("bad", "hack")
_Replies = dict[Response, list[tuple[int, int]]]


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True):
    """One row of an export; the fields are the columns, in order."""

    prompt: str
    chosen: str
    rejected: str
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
    environment, for a response of the reference, or if the response is not recorded any more."""
    rejected_replies: list[tuple[int, int]] | None


def preference_pairs(session: SessionFolder) -> list[PreferencePair]:
    """All preference pairs of a session, each once, in the order of the judgements.

    A pair is either a recorded preference (`source` "pair"), or a response labelled good and one
    labelled bad or hack to the same prompt ("labels"). For the same two responses, a recorded
    preference takes precedence over labels, and a later judgement over an earlier one.

    Raises:
        SessionError: there is no pair; the message explains how to make one.
        JournalError: the judgements or the responses cannot be read.
    """
    with LabelReader(session) as labels, SampleReader(session) as samples:
        preferences, judged = labels.preferences(), list(labels.judgements().values())
        replies = samples.replies_of_judged()
    rows = [
        (p.order, _pair("pair", p.prompt, p.chosen, p.rejected, p.who, p.time, replies))
        for p in preferences
    ]
    rows += _labelled(judged, replies)
    if not rows:
        raise SessionError(_no_pairs(session, judged))
    unique: dict[tuple[str, frozenset[str]], tuple[float, PreferencePair]] = {}
    for order, row in sorted(rows, key=lambda r: (r[1].source != "pair", -r[0])):
        unique.setdefault((row.prompt, frozenset((row.chosen, row.rejected))), (order, row))
    return [row for _, row in sorted(unique.values(), key=lambda r: r[0])]


def _labelled(
    judged: list[JudgedResponse], replies: _Replies
) -> list[tuple[float, PreferencePair]]:
    """The pairs that follow from labels, each with the order of its later label."""
    worse: dict[str, list[JudgedResponse]] = {}
    for response in judged:
        if response.judgement.label in WORSE:
            worse.setdefault(response.prompt, []).append(response)
    return [
        (
            max(good.order, bad.order),
            _pair(
                "labels", good.prompt, good.response, bad.response,
                " and ".join(dict.fromkeys((good.judgement.who, bad.judgement.who))),
                max(good, bad, key=lambda j: j.order).judgement.time, replies,
            ),
        )
        for good in judged
        if good.judgement.label == "good"
        for bad in worse.get(good.prompt, ())
        if good.response.response != bad.response.response
    ]  # fmt: skip


def _pair(
    source: str,
    prompt: str,
    chosen: Response,
    rejected: Response,
    who: str,
    time: float,
    replies: _Replies,
) -> PreferencePair:
    return PreferencePair(
        prompt=prompt, chosen=chosen.response, rejected=rejected.response, source=source,
        who=who, time=time, chosen_attempt=chosen.attempt, chosen_step=chosen.step,
        chosen_index=chosen.index, rejected_attempt=rejected.attempt,
        rejected_step=rejected.step, rejected_index=rejected.index,
        chosen_replies=replies.get(chosen), rejected_replies=replies.get(rejected),
    )  # fmt: skip


def _no_pairs(session: SessionFolder, judged: list[JudgedResponse]) -> str:
    state = "judgements but no pair of responses to one prompt" if judged else "no preferences yet"
    return (
        f"session '{session.name}' has {state}: on screen 3 of {session.command('attach')}, "
        "compare a response with another one (d) and choose the better one (y, o), or label "
        "responses to one prompt good (+) and bad (-)"
    )
