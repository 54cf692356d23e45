"""The evaluations of a run: before its first step, after steps, and again if a reward failed."""

import math

from engine.config.schema import RunConfig
from engine.errors import RlhfError
from engine.metrics import EVAL_SOURCE
from engine.protocol.rank_messages import REWARD_FAILED, Begin, EvaluationReport, Notice
from engine.train.boundary import Boundary
from engine.train.evaluation.evaluate import REWARD_FAILURES, Evaluation, evaluate_if_due, recorded
from engine.train.link import Link
from engine.train.reports.recorders import StepRecorder
from engine.train.reward_scales import fit_scales
from engine.train.rewards.source import RewardCallError
from engine.train.run import Run


def measure_before_training(boundary: Boundary, run: Run, config: RunConfig) -> Evaluation:
    """Takes the measurements that need rewards before training; pauses while rewards fail.

    Args:
        boundary: before the first step.
        run: the run.
        config: the configuration that it was loaded with.

    Returns:
        The evaluation before the first step. Empty for a resumed run, if none is due, or if the run
        is stopped first.
    """
    fitted = False
    while True:
        try:
            if not fitted:
                fit_scales(run, config)
                fitted = True
            evaluation = Evaluation() if run.state.step else evaluate_if_due(run, 0)
            evaluation.check()
        except RewardCallError as error:
            boundary.pause_before_step(error)
            if not boundary.before_step():
                return Evaluation()
        else:
            return evaluation


def evaluate_or_skip(run: Run, step: int) -> tuple[Evaluation, RewardCallError | None]:
    """Evaluates after a step if that is due.

    Returns:
        The evaluation, and an error to pause with if a reward could not be computed or used. In
        that case the evaluation is empty, or lacks the sources of `eval.rewards` that failed.
    """
    try:
        evaluation = evaluate_if_due(run, step)
    except REWARD_FAILURES as error:
        return Evaluation(), _pausing(error, f"step {step} is not evaluated")
    if not evaluation.failed:
        return evaluation, None
    first, *others = evaluation.failed.values()
    without = ", ".join(f"'{name}'" for name in evaluation.failed)
    consequence = f"step {step} is evaluated without {without}"
    return evaluation, _pausing(first, "; ".join([*map(str, others), consequence]))


def incomplete_evaluation(run: Run, begin: Begin) -> Evaluation | None:
    """The evaluation that the journal has of the step that a run starts from, if it lacks a part.

    It can lack all of it, or sources of `eval.rewards` that failed. :func:`make_up` does nothing at
    a step without an evaluation.

    Returns:
        None if nothing is to be made up for; an evaluation whose metrics have no values otherwise.
    """
    if run.held_out is None:
        return None
    if begin.unevaluated:
        return Evaluation()
    sources = run.held_out.rewards.names if run.held_out.rewards is not None else []
    expected = {EVAL_SOURCE.replace("NAME", name) for name in sources}
    if not begin.recorded or expected <= set(begin.recorded):
        return None
    return Evaluation(dict.fromkeys(begin.recorded, math.nan))


def make_up(
    boundary: Boundary, run: Run, link: Link, recorders: list[StepRecorder], before: Evaluation
) -> None:
    """Evaluates the last step again after the pause that began because a reward had failed.

    The weights are still those of the step, so only what `before`, the failed evaluation, lacks is
    reported. If it fails again, the operator is notified and the run continues: if the reward still
    fails, the next step pauses the run.
    """
    step = run.state.step
    evaluation, problem = evaluate_or_skip(run, step)
    if problem is not None:
        link.send(Notice(step=step, rule=REWARD_FAILED, text=str(problem)))
    metrics = {k: v for k, v in evaluation.metrics.items() if k not in before.metrics}
    if metrics:
        link.send(EvaluationReport(metrics, recorded(evaluation.samples), step))
        for recorder in recorders:
            recorder.step(step, metrics, [])
        boundary.evaluated(metrics)


def _pausing(error: RlhfError, more: str) -> RewardCallError:
    """Returns the error that pauses the run after a step whose evaluation failed."""
    text = f"{error}; {more}"
    if not isinstance(error, RewardCallError):
        return RewardCallError(text)
    return RewardCallError(
        text, error.trace, recovers=error.recovers, works_again=error.works_again
    )
