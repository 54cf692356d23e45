"""What an export of preferences holds: pairs of answers to one prompt, a better and a worse one.

In the columns that trainers of preferences read (`prompt`, `chosen`, `rejected`), and beside them
who said so, when, and where each answer came from.
"""

import msgspec

from engine.errors import NoSuchSessionError
from engine.journal.labels import JudgedResponse, LabelReader, Response
from engine.session.folder import Session

WORSE = ("bad", "hack")


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an export; the fields are its columns, in their order."""

    prompt: str
    chosen: str
    rejected: str
    source: str
    """`pair`: the two were compared; `labels`: each was labelled."""
    who: str
    time: float
    chosen_attempt: int | None
    """None, as step and index are: the response is the reference's."""
    chosen_step: int | None
    chosen_index: int | None
    rejected_attempt: int | None
    rejected_step: int | None
    rejected_index: int | None


def preference_pairs(session: Session) -> list[PreferencePair]:
    """Every pair once, the oldest first.

    Two answers that were held against each other (`source` "pair"), and of those to the same prompt
    each that is labelled good with each that is bad or a hack ("labels"). What was said of a pair
    counts before what its labels say, a later word before an earlier one. Answers of the reference
    have no attempt, step and index.

    Raises:
        NoSuchSessionError: there is no pair; says how to make one.
        JournalError: the judgements cannot be read.
    """
    with LabelReader(session) as labels:
        said, judged = labels.preferences(), list(labels.judgements().values())
    rows = [_pair("pair", p.prompt, p.chosen, p.rejected, p.who, p.time) for p in said]
    rows += _labelled(judged)
    if not rows:
        raise NoSuchSessionError(_none_yet(session, judged))
    found: dict[tuple[str, frozenset[str]], PreferencePair] = {}
    for row in sorted(rows, key=lambda r: (r.source != "pair", -r.time)):
        found.setdefault((row.prompt, frozenset((row.chosen, row.rejected))), row)
    return sorted(found.values(), key=lambda r: r.time)


def _labelled(judged: list[JudgedResponse]) -> list[PreferencePair]:
    worse: dict[str, list[JudgedResponse]] = {}
    for response in judged:
        if response.judgement.label in WORSE:
            worse.setdefault(response.prompt, []).append(response)
    return [
        _pair(
            "labels", good.prompt, good.answer, bad.answer,
            " and ".join(dict.fromkeys((good.judgement.who, bad.judgement.who))),
            max(good.judgement.time, bad.judgement.time),
        )
        for good in judged
        if good.judgement.label == "good"
        for bad in worse.get(good.prompt, ())
        if good.answer.response != bad.answer.response
    ]  # fmt: skip


def _pair(
    source: str, prompt: str, chosen: Response, rejected: Response, who: str, time: float
) -> PreferencePair:
    return PreferencePair(
        prompt=prompt, chosen=chosen.response, rejected=rejected.response, source=source,
        who=who, time=time, chosen_attempt=chosen.attempt, chosen_step=chosen.step,
        chosen_index=chosen.index, rejected_attempt=rejected.attempt,
        rejected_step=rejected.step, rejected_index=rejected.index,
    )  # fmt: skip


def _none_yet(session: Session, judged: list[JudgedResponse]) -> str:
    lack = "judgements but no pair of answers to one prompt" if judged else "no preferences"
    return (
        f"session '{session.name}' has {lack} yet: on screen 3 of rlhf-tui attach {session.name}, "
        "hold an answer against another one (d) and say which is better (y, o), or label answers "
        "to one prompt good (+) and bad (-)"
    )
