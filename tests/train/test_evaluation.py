"""Held-out evaluation: what is held out is never trained on, and the numbers repeat."""

import json
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import torch

from engine.errors import RewardError, UserInputError
from engine.protocol import frames
from engine.protocol.rank_messages import Begin, EvaluationReport, Notice, Sample, TokenArrays
from engine.session.folder import create
from engine.train.boundary import Boundary, BoundaryBroadcast
from engine.train.evaluation.evaluate import (
    RECORDED_BYTES,
    RECORDED_TOKENS,
    Evaluation,
    confidence_interval,
    evaluate_if_due,
    recorded,
)
from engine.train.evaluation.scheduled import evaluate_or_skip, incomplete_evaluation, make_up
from engine.train.link import Link
from engine.train.rewards.source import RewardCallError
from engine.train.step import train_step
from engine.train.worker import step_report

EVALUATED = ("eval.every=1", "eval.holdout=6", "eval.per_prompt=2", "data.shuffle=true")


def texts(prompts):
    return {p.text for p in prompts}


def test_held_out_prompts_are_in_no_step(make_run):
    run, _ = make_run(*EVALUATED)
    held_out = texts(run.held_out.prompts)
    passes = -(-2 * len(run.prompts) // 8)
    trained = set().union(*(texts(run.prompts.for_step(s)) for s in range(1, passes + 1)))
    assert len(held_out) == 6
    assert trained == texts(run.prompts.first(len(run.prompts)))
    assert not trained & held_out


def test_prompts_of_a_file_that_are_trained_on_are_left_out(make_run, write_prompts):
    trained = write_prompts("a.jsonl", '{"prompt": "The food"}\n{"prompt": "The room"}\n')
    other = write_prompts("b.jsonl", '{"prompt": "The room"}\n{"prompt": "The sound"}\n')
    run, _ = make_run(f"data.prompts={trained}", f"eval.prompts={other}", "eval.every=1")
    assert texts(run.held_out.prompts) == {"The sound"}


def test_a_reward_function_gets_none_for_a_column_that_only_the_training_data_has(
    make_run, write_prompts
):
    trained = write_prompts("a.jsonl", '{"prompt": "The food", "answer": "good"}\n')
    other = write_prompts("b.jsonl", '{"prompt": "The sound", "source": "b"}\n')
    code = "def reward(completions, answer, **_):\n    return [float(a is None) for a in answer]\n"
    folder = Path(write_prompts("missing_answers.py", code)).parent
    run, _ = make_run(
        f"data.prompts={trained}", f"eval.prompts={other}", "eval.every=1", "reward.model=null",
        "reward.function=missing_answers:reward", f"reward.path={folder}",
    )  # fmt: skip
    assert run.held_out.prompts[0].row == {"prompt": "The sound", "source": "b", "answer": None}
    assert evaluate_if_due(run, 0).metrics["eval/score"] == 1


def test_without_a_prompt_that_is_not_trained_on_the_start_is_refused(make_run, write_prompts):
    same = write_prompts("a.jsonl", '{"prompt": "The food"}\n')
    with pytest.raises(UserInputError, match="none is held out"):
        make_run(f"data.prompts={same}", f"eval.prompts={same}", "eval.every=1")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"prompt": "held out"}', "data.system needs conversations, and row 1 of "),
        ('{"question": "held out"}', "eval.column: no column 'prompt' in "),
    ],
)
def test_a_problem_of_the_prompts_to_evaluate_is_told_with_a_key_that_there_is(
    make_run, write_prompts, text, key
):
    trained = write_prompts("chat.jsonl", '{"prompt": [{"role": "user", "content": "so"}]}')
    other = write_prompts("held.jsonl", text)
    with pytest.raises(UserInputError, match=f"^{key}"):
        make_run(
            f"data.prompts={trained}", "data.system=Be brief.",
            "data.chat_template='{{ messages }}'", f"eval.prompts={other}", "eval.every=1",
        )  # fmt: skip


def test_an_evaluation_repeats_bit_for_bit_and_leaves_no_trace(make_run, assert_same_step):
    run, _ = make_run(*EVALUATED)
    again, _ = make_run(*EVALUATED)
    train_step(run, 1)
    train_step(again, 1)
    first, second = evaluate_if_due(run, 1), evaluate_if_due(run, 1)
    assert first.samples == second.samples
    assert len(first.samples) == 12
    for name, value in first.metrics.items():
        assert name == "time/evaluate" or second.metrics[name] == value
    assert_same_step(run, again, 2)  # one with an evaluation in between, one without


def test_before_the_first_step_the_policy_is_the_reference(make_run):
    run, _ = make_run(*EVALUATED)
    evaluation = evaluate_if_due(run, 0)
    assert evaluation.metrics["eval/kl"] == pytest.approx(0, abs=1e-4)
    mean = sum(s.score for s in evaluation.samples) / len(evaluation.samples)
    assert evaluation.metrics["eval/score"] == pytest.approx(mean)


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_the_best_score_is_the_mean_of_each_prompts_highest(make_run, per_prompt):
    run, _ = make_run(*EVALUATED, f"eval.per_prompt={per_prompt}")
    evaluation = evaluate_if_due(run, 0)
    best = {}
    for sample in evaluation.samples:
        best[sample.prompt] = max(sample.score, best.get(sample.prompt, -1e9))
    assert len(evaluation.samples) == per_prompt * len(best) > 1
    want = sum(best.values()) / len(best) if per_prompt > 1 else None
    assert evaluation.metrics.get("eval/best_score") == pytest.approx(want)


def test_greedy_responses_do_not_depend_on_the_seed(make_run):
    run, _ = make_run(*EVALUATED, "eval.temperature=0")
    other, _ = make_run(*EVALUATED, "eval.temperature=0", "eval.seed=5")
    ours, theirs = (evaluate_if_due(r, 0).samples for r in (run, other))
    assert [s.response for s in ours] == [s.response for s in theirs]


def test_an_evaluation_without_word_pairs_has_no_fraction_of_different_ones(make_run):
    run, _ = make_run(*EVALUATED, "eval.max_new_tokens=1")
    found = evaluate_if_due(run, 0)
    assert not [s for s in found.samples if len(s.response.split()) > 1]
    assert "eval/distinct_2" not in found.metrics


def test_a_watched_source_is_reported_and_changes_no_score(make_run):
    whole = "reward.model=starter:reward"
    watched = "eval.rewards=[{model: 'starter:reward', name: watched, weight: 9}]"
    run, _ = make_run(*EVALUATED, whole, watched)
    plain, _ = make_run(*EVALUATED, whole)
    ours, theirs = evaluate_if_due(run, 0), evaluate_if_due(plain, 0)
    assert ours.metrics["eval/score"] == theirs.metrics["eval/score"]
    assert ours.metrics["eval/reward/watched"] == pytest.approx(ours.metrics["eval/score"])
    assert ours.samples[0].parts["watched"] == pytest.approx(ours.samples[0].score, abs=1e-5)


def test_the_interval_is_that_of_the_prompts_means():
    scores = [1.0, 3.0, 4.0, 8.0, 0.0, 2.0]
    means = torch.tensor([2.0, 6.0, 1.0])
    expected = 1.96 * float(means.std()) / 3**0.5
    assert confidence_interval(scores, 2) == pytest.approx(expected)
    assert confidence_interval([1.0, 2.0], 2) is None


def test_the_run_ends_when_a_metric_has_reached_its_aim(make_run):
    run, session = make_run("train.stop_at={metric: objective/scores, above: -100}")
    boundary = Boundary(session, run, Begin(attempt=1, from_step=0), Link(0))
    metrics, _ = train_step(run, 1)
    boundary.after_step(1, metrics, 0.1)
    assert not boundary.before_step()
    boundary.close()


def test_the_ranks_end_together_by_rank_0_s_verdict_on_the_aim(make_run, monkeypatch):
    run, session = make_run("train.stop_at={metric: time/step, above: 1e6}")
    boundary = Boundary(session, run, Begin(attempt=1, from_step=0), Link(0))
    verdict = BoundaryBroadcast(commands=[], seconds=1.0, beta=0.1, reached=True)
    data = msgspec.msgpack.encode(verdict)
    monkeypatch.setattr(run.ranks, "broadcast_bytes", lambda _data: data)
    assert not boundary.before_step()
    boundary.close()


def test_scores_of_held_out_responses_that_cannot_be_used_do_not_end_the_run(make_run):
    run, _ = make_run(*EVALUATED)

    def refuse(*_args, **_options):
        raise RewardError("not a number")

    run.rewards = refuse
    evaluation, problem = evaluate_or_skip(run, 1)
    assert (evaluation.metrics, str(problem)) == ({}, "not a number; step 1 is not evaluated")


def test_an_evaluation_that_is_made_up_for_has_the_numbers_of_its_step(make_run, supervisor, link):
    run, session = make_run(*EVALUATED, "train.stop_at={metric: eval/score, above: -100}")
    expected = evaluate_if_due(run, 0)
    with closing(Boundary(session, run, Begin(attempt=1, from_step=0), link)) as boundary:
        assert boundary.before_step()
        make_up(boundary, run, link, [], Evaluation())
        report = supervisor.wait_for(EvaluationReport)
        assert not boundary.before_step(), "the aim is reached"
    assert report.samples == expected.samples
    assert report.metrics | {"time/evaluate": 0} == expected.metrics | {"time/evaluate": 0}


def test_an_evaluation_that_fails_again_is_left_out_with_a_notice(make_run, supervisor, link):
    run, session = make_run(*EVALUATED)

    def fail(*_args, **_options):
        raise RewardCallError("no service")

    run.rewards = fail
    with closing(Boundary(session, run, Begin(attempt=1, from_step=0), link)) as boundary:
        make_up(boundary, run, link, [], Evaluation())
        assert supervisor.wait_for(Notice).text == "no service; step 0 is not evaluated"
        assert boundary.before_step(), "the run continues"
    assert supervisor.of(EvaluationReport) == []


@pytest.fixture
def watched_run(make_run, tmp_path):
    """A run with three watched sources, of which one fails in the second call of the evaluation."""
    (tmp_path / "watched_for_test.py").write_text(
        "calls, works_again = [], []\n"
        "def fails(completions, **_):\n"
        "    calls.append(len(completions))\n"
        "    if len(calls) > 1 and not works_again: raise ValueError('gone')\n"
        "    return [1.0] * len(completions)\n"
        "worked = []\n"
        "def works(completions, **_):\n"
        "    worked.append(len(completions))\n"
        "    return [2.0] * len(completions)\n",
        encoding="utf-8",
    )
    sources = "{function: 'watched_for_test:fails'}, {function: 'watched_for_test:works'}"
    watched = f"eval.rewards=[{sources}]"
    keys = (f"reward.path={tmp_path}", "reward.retries=0", "train.ema.decay=0.9")
    run, _ = make_run(*EVALUATED, watched, *keys)
    yield run
    sys.modules.pop("watched_for_test", None)
    sys.path[:] = [p for p in sys.path if p != str(tmp_path)]


def test_a_watched_source_that_fails_costs_its_own_metric_alone(watched_run):
    evaluation, problem = evaluate_or_skip(watched_run, 1)
    assert evaluation.metrics["eval/reward/works"] == 2.0
    assert {"eval/score", "eval/kl"} < evaluation.metrics.keys()
    assert "eval/reward/fails" not in evaluation.metrics
    assert [s.parts["fails"] for s in evaluation.samples] == [1.0] * 6 + [None] * 6
    assert str(problem).endswith("step 1 is evaluated without 'fails'")
    assert "gone" in problem.trace


def test_only_the_metric_of_a_watched_source_that_failed_is_made_up_for(
    watched_run, supervisor, link, tmp_path
):
    before, _ = evaluate_or_skip(watched_run, 1)
    sys.modules["watched_for_test"].works_again.append(True)
    begin = Begin(attempt=1, from_step=0)
    session = create(tmp_path, "session", watched_run.config)
    with closing(Boundary(session, watched_run, begin, link)) as boundary:
        make_up(boundary, watched_run, link, [], before)
        report = supervisor.wait_for(EvaluationReport)
    assert report.metrics == {"eval/reward/fails": 1.0}
    assert {s.parts["fails"] for s in report.samples} == {1.0}


def test_after_a_restart_the_metric_of_a_watched_source_that_failed_is_made_up_for(
    watched_run, supervisor, link, tmp_path
):
    before, _ = evaluate_or_skip(watched_run, 1)
    sys.modules["watched_for_test"].works_again.append(True)
    begin = Begin(attempt=2, from_step=0, recorded=["objective/kl", *before.metrics])
    missing = incomplete_evaluation(watched_run, begin)
    session = create(tmp_path, "session", watched_run.config)
    with closing(Boundary(session, watched_run, begin, link)) as boundary:
        make_up(boundary, watched_run, link, [], missing)
        report = supervisor.wait_for(EvaluationReport)
    assert report.metrics == {"eval/reward/fails": 1.0}


def test_nothing_is_made_up_for_of_a_whole_evaluation_or_of_one_of_another_engine(watched_run):
    sources = ["eval/reward/fails", "eval/reward/works"]
    for known in (["eval/score", *sources], []):
        begin = Begin(attempt=2, from_step=0, recorded=known)
        assert incomplete_evaluation(watched_run, begin) is None


def test_a_watched_source_that_failed_is_not_called_again_in_the_evaluation(watched_run):
    evaluate_if_due(watched_run, 1)
    evaluate_if_due(watched_run, 1)
    # Two parts of the prompts: both in the first evaluation, of which the second fails, and one in
    # the second evaluation, which fails.
    assert sys.modules["watched_for_test"].calls == [6, 6, 6]


def test_responses_of_the_averaged_policy_are_not_given_to_watched_sources(watched_run):
    assert "eval/ema_score" in evaluate_if_due(watched_run, 1).metrics
    assert sys.modules["watched_for_test"].worked == [6, 6]


def test_of_very_many_responses_as_many_are_recorded_as_a_message_holds():
    text = "x" * (RECORDED_BYTES // 10)
    samples = [
        Sample(index=i, prompt="", response=text, score=0.0, kl=0.0, length=1, ended=True)
        for i in range(20)
    ]
    kept = recorded(samples)
    assert [s.index for s in kept] == list(range(9))
    frames.encode(EvaluationReport(metrics={}, samples=kept))


def test_a_step_whose_arrays_no_message_holds_is_reported_with_fewer_of_them(make_run):
    run, _ = make_run()
    samples = with_arrays("r", " the", 2 * RECORDED_TOKENS // 7, 8)
    report = step_report(run, 1, {}, samples, {}, [], Evaluation())
    assert [s.arrays is not None for s in report.samples] == [True] * 3 + [False] * 5
    frames.encode(report)


def test_a_message_holds_a_step_and_an_evaluation_of_texts_in_chinese(make_run):
    run, _ = make_run()
    length = RECORDED_TOKENS // 10
    samples = with_arrays("强化学习" * length, "强化学习", length, 33)
    evaluation = Evaluation(samples=[msgspec.structs.replace(s, arrays=None) for s in samples])
    frames.encode(step_report(run, 1, {}, samples, {}, [], evaluation))


def with_arrays(response, token, length, count):
    """Samples with values for each token."""
    values = [-0.1] * length
    arrays = TokenArrays(
        tokens=[token] * length, token_ids=[50_000] * length, logprob=values, ref_logprob=values,
        advantage=values, value=values,
    )  # fmt: skip
    return [
        Sample(
            index=i, prompt="p", response=response, score=0.0, kl=0.0, length=length, ended=True,
            arrays=arrays,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_is_not_due_has_no_evaluation(make_run, step):
    run, _ = make_run("eval.every=3", "eval.holdout=4")
    assert not evaluate_if_due(run, step).metrics
    assert json.dumps(evaluate_if_due(run, step).samples) == "[]"
