"""Measures agreement of scores with held-out judgements, and calibration of their differences."""

import math
from collections.abc import Sequence
from statistics import fmean

from engine.agreement import JudgedScore, interval, placements, preference_agreement
from engine.protocol.programs.reward_training import Calibration, HeldOutAgreement, ScoreScale
from engine.train.reward_training.split import Judgement

Scores = Sequence[float | None]
"""Scores by response; None where there is none."""


def held_out_agreement(judgements: Sequence[Judgement], scores: Scores) -> HeldOutAgreement | None:
    """The agreement with those judgements whose responses have scores; None if there are none."""
    found = []
    labelled = []
    for judgement in judgements:
        score = scores[judgement.response]
        if score is None:
            continue
        if judgement.rejected is None:
            labelled.append(JudgedScore(0, score, judgement.good))
        elif (rejected := scores[judgement.rejected]) is not None:
            found.append(preference_agreement(score, rejected))
    found += [point.agreement for point in placements(labelled)]
    if not found:
        return None
    mean = fmean(found)
    low, high = interval(mean, len(found))
    return HeldOutAgreement(judgements=len(found), agreement=mean, low=low, high=high)


def comparisons(judgements: Sequence[Judgement]) -> list[tuple[int, int]]:
    """The preferences, and each good response with each other one: the better, the worse."""
    pairs = [(j.response, j.rejected) for j in judgements if j.rejected is not None]
    labels = [j for j in judgements if j.rejected is None]
    good = [j.response for j in labels if j.good]
    return pairs + [(g, j.response) for g in good for j in labels if not j.good]


def calibrate(judgements: Sequence[Judgement], scores: Sequence[float]) -> Calibration:
    """Compares the predicted probabilities with the judgements; needs at least one comparison."""
    margins = [scores[better] - scores[worse] for better, worse in comparisons(judgements)]
    return Calibration(
        comparisons=len(margins),
        stated=fmean(1 / (1 + math.exp(-min(abs(m), 700.0))) for m in margins),
        right=fmean(0.5 if m == 0 else float(m > 0) for m in margins),
        log_loss=fmean(_softplus(-m) for m in margins),
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def scale_of(scores: Scores) -> ScoreScale | None:
    """Mean and standard deviation of those that are numbers; None for fewer than two."""
    known = [s for s in scores if s is not None]
    if len(known) < 2:
        return None
    mean = fmean(known)
    return ScoreScale(mean, math.sqrt(fmean((s - mean) ** 2 for s in known)))
