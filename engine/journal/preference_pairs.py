"""What an export of preferences holds: pairs of answers to one prompt, a better and a worse one.

In the columns that trainers of preferences read (`prompt`, `chosen`, `rejected`), and beside them
who said so, when, and where each answer came from.
"""

from typing import Any

from engine.errors import NoSuchSessionError
from engine.journal.labels import Judgement, LabelReader, Response
from engine.session.folder import Session

WORSE = ("bad", "hack")


def preference_pairs(session: Session) -> list[dict[str, Any]]:
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
    rows = [_row("pair", p.prompt, p.chosen, p.rejected, p.who, p.time) for p in said]
    rows += _labelled(judged)
    if not rows:
        raise NoSuchSessionError(_none_yet(session, judged))
    found: dict[tuple[str, frozenset[str]], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (r["source"] != "pair", -r["time"])):
        found.setdefault((row["prompt"], frozenset((row["chosen"], row["rejected"]))), row)
    return sorted(found.values(), key=lambda r: r["time"])


def _labelled(judged: list[Judgement]) -> list[dict[str, Any]]:
    worse: dict[str, list[Judgement]] = {}
    for judgement in judged:
        if judgement.label in WORSE:
            worse.setdefault(judgement.prompt, []).append(judgement)
    return [
        _row(
            "labels", good.prompt, good.answer, bad.answer,
            " and ".join(dict.fromkeys((good.who, bad.who))), max(good.time, bad.time),
        )
        for good in judged
        if good.label == "good"
        for bad in worse.get(good.prompt, ())
        if good.answer.response != bad.answer.response
    ]  # fmt: skip


def _row(
    source: str, prompt: str, chosen: Response, rejected: Response, who: str, time: float
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": prompt, "chosen": chosen.response, "rejected": rejected.response,
        "source": source, "who": who, "time": time,
    }  # fmt: skip
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        for place in ("attempt", "step", "index"):
            row[f"{name}_{place}"] = getattr(side, place)
    return row


def _none_yet(session: Session, judged: list[Judgement]) -> str:
    lack = "judgements but no pair of answers to one prompt" if judged else "no preferences"
    return (
        f"session '{session.name}' has {lack} yet: on screen 3 of rlhf-tui attach {session.name}, "
        "hold an answer against another one (d) and say which is better (y, o), or label answers "
        "to one prompt good (+) and bad (-)"
    )
