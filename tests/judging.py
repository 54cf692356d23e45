"""Answers to be judged, and what is on file of them."""

from engine.journal.judgements.labels import LabelReader, Response
from engine.journal.rows import SampleRow

STEPS = 6
"""Of the session whose answers are judged in the app."""


def answer(step, index=0, attempt=1, response=None):
    """One of an attempt, with the words that the tests' journals have there."""
    return Response(
        response=response or f"answer {step}.{index}", attempt=attempt, step=step, index=index
    )


def sample(step, **given):
    """A row of samples.db."""
    row = {
        "index": 0, "attempt": 1, "prompt": "a", "response": "b", "score": 1.0, "kl": 1.0,
        "length": 2, "ended": True,
    }  # fmt: skip
    return SampleRow(step=step, **(row | given))


def judgements(session):
    """Label and note by step and index."""
    with LabelReader(session) as labels:
        return {
            (j.response.step, j.response.index): (j.judgement.label, j.judgement.note)
            for j in labels.judgements().values()
        }  # fmt: skip
