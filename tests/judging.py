"""Answers to be judged, and what is on file of them."""

from engine.journal.labels import LabelReader, Response

STEPS = 6
"""Of the session whose answers are judged in the app."""


def answer(step, index=0, attempt=1, response=None):
    """One of an attempt, with the words that the tests' journals have there."""
    return Response(
        response=response or f"answer {step}.{index}", attempt=attempt, step=step, index=index
    )


def judgements(session):
    """Label and note by step and index."""
    with LabelReader(session) as labels:
        return {
            (j.answer.step, j.answer.index): (j.label, j.note)
            for j in labels.judgements().values()
        }  # fmt: skip
