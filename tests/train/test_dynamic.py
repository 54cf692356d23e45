"""Dynamic sampling: which prompts are drawn again, and what the batch holds afterwards."""

import torch

from engine.train.data.prompts import batch_prompts
from engine.train.experience.generation import generate_rollout
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.rewards.mix import Scores
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.rollout import replace_rows
from engine.train.step import train_step

GROUPS = ("ppo.advantage=grpo", "rollout.per_prompt=2", "rollout.dynamic=true")


class Judge:
    """Scores of 0 for every response of some prompts, of a running number for all others."""

    def __init__(self, dull):
        self.dull = dull
        self.calls = 0

    def __call__(self, inputs, report=None, **_options):
        self.calls += 1
        scores = [
            0.0 if self.dull(p.text, self.calls) else float(i)
            for i, p in enumerate(inputs.batch.prompts)
        ]
        none = [None] * len(scores)
        return Scores(torch.tensor(scores), {"judge": scores}, {"judge": none})


def first_prompts(run):
    return {p.text for p in run.prompts.for_step(1)[:2]}


def judged(make_run, dull, *overrides):
    run, _ = make_run(*GROUPS, *overrides)
    run.rewards = Judge(lambda text, call: dull(run, text, call))
    return run, train_step(run, 1)


def test_prompts_without_variance_are_replaced_and_counted(make_run):
    run, (metrics, samples) = judged(
        make_run, lambda run, text, call: call == 1 and text in first_prompts(run)
    )
    assert run.rewards.calls == 2
    assert metrics["val/redrawn_prompts"] == 2
    assert metrics["objective/zero_std_frac"] == 0
    prompts = [s.prompt for s in samples]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    kept = [p.text for p in run.prompts.for_step(1)][2:]
    assert prompts[4::2] == kept
    assert all(s.parts["judge"] == s.score for s in samples)


def test_prompts_whose_mean_score_is_out_of_range_are_replaced(make_run):
    # The scores of the first draw are 0 to 7, with means of 0.5 to 6.5; those of the second 0 to 3,
    # with means of 0.5 and 2.5. So one of the two unwanted prompts is replaced, the other is kept.
    run, (metrics, samples) = judged(
        make_run, lambda *_: False, "rollout.dynamic_range=[0.5, 6]", "rollout.dynamic_limit=1"
    )
    assert metrics["val/redrawn_prompts"] == 2
    assert [s.score for s in samples] == [2, 3, 2, 3, 4, 5, 6, 7]
    own = [p.text for p in run.prompts.for_step(1)]
    assert [s.prompt for s in samples[2::2]] == own[1:]
    assert samples[0].prompt != own[0]


def test_what_has_no_variance_after_the_last_attempt_stays(make_run):
    run, (metrics, samples) = judged(make_run, lambda *_: True, "rollout.dynamic_limit=3")
    assert run.rewards.calls == 4
    assert metrics["val/redrawn_prompts"] == 3 * 4
    assert metrics["objective/zero_std_frac"] == 1
    assert [s.prompt for s in samples[::2]] == [p.text for p in run.prompts.for_step(1)]


def test_a_step_with_replacements_is_the_same_when_it_is_taken_again(make_run):
    def dull(run, text, call):
        return call < 3 and text in first_prompts(run) | {
            p.text for p in run.prompts.replacements(1, 1, 1)
        }

    one, (ours, _) = judged(make_run, dull)
    two, (theirs, _) = judged(make_run, dull)
    assert ours["val/redrawn_prompts"] >= 2
    assert {k: v for k, v in ours.items() if not k.startswith(("time/", "perf/"))} == {
        k: v for k, v in theirs.items() if not k.startswith(("time/", "perf/"))
    }
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_replaced_rows_keep_their_log_probabilities_whatever_the_padding(make_run):
    run, _ = make_run("rollout.per_prompt=2")
    one = generate_rollout(run, 1)
    two = generate_rollout(run, 2)
    rows, others = torch.tensor([2, 3]), torch.tensor([6, 7])
    merged = replace_rows(one, rows, two, others)
    assert merged.texts == one.texts[:2] + two.texts[6:] + one.texts[4:]
    assert RewardInputs.of(merged, 1).ids[2:4] == RewardInputs.of(two, 2).ids[6:]
    plain = batch_prompts(merged.batch.prompts[::2], 2, 0)
    assert torch.equal(plain.lengths, merged.batch.lengths)
    logprobs, _ = score_tokens(run.policy, merged, 1.0, MicroBatchLimit(8))
    gap = (logprobs - merged.logprobs * merged.mask).abs().max()
    assert gap < 1e-4


def test_replacements_do_not_repeat_and_differ_between_attempts(make_run):
    run, _ = make_run()
    first = [p.text for p in run.prompts.replacements(3, 1, 20)]
    assert first == [p.text for p in run.prompts.replacements(3, 1, 30)][:20]
    assert first != [p.text for p in run.prompts.replacements(3, 2, 20)]
    assert len(run.prompts.replacements(3, 1, len(run.prompts) + 1)) == len(run.prompts) + 1
