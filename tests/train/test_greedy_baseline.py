"""The baseline of ReMax: the scores of the most likely responses."""

import torch

from engine.train.experience.generation import generate_rollout
from engine.train.experience.greedy_baseline import greedy_rollout, greedy_scores
from engine.train.rewards.mix import Scores


def test_the_greedy_rollout_has_each_prompt_s_most_likely_response(make_run):
    run, _ = make_run("ppo.advantage=remax", "rollout.per_prompt=2")
    rollout = generate_rollout(run, 1)
    greedy = greedy_rollout(run, 1, rollout)
    for i, prompt in enumerate(greedy.batch.prompts):
        assert prompt is rollout.batch.prompts[2 * i]
        ids = list(prompt.ids)
        for token in greedy.ids[i, : greedy.lengths[i]].tolist():
            logits = run.policy(torch.tensor([ids]), torch.ones(1, len(ids), dtype=int), 1).logits
            assert token == int(logits[0, -1].argmax())
            ids.append(token)


def test_the_scores_of_the_greedy_baseline_are_clipped_as_in_training(make_run):
    run, _ = make_run("ppo.advantage=remax", "rollout.per_prompt=2", "reward.clip=0.5")
    run.rewards = lambda _responses, _report: Scores(torch.arange(4.0) / 4, {}, {})
    found = greedy_scores(run, 1, generate_rollout(run, 1))
    assert found.tolist() == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5]
