"""Steps whose reward sources are normalised within groups (GDPO)."""

import statistics

import pytest

from engine.train.step import train_step

FUNCTIONS = """
def length(completions, **_):
    return [float(len(text)) for text in completions]


def letters(completions, **_):
    return [float(text.count("e")) for text in completions]


def first(completions, **_):
    return [2.0 * (i % 4 == 0) for i in range(len(completions))]


def others(completions, **_):
    return [1.0 * (i % 4 > 0) for i in range(len(completions))]

"""


@pytest.fixture
def step_of(make_run, tmp_path):
    """Returns a function that takes a step with weighted sources, normalised within groups of 4."""
    (tmp_path / "two_rewards.py").write_text(FUNCTIONS)

    def take(weights, *overrides):
        mix = [
            f"{{function: 'two_rewards:{name}', name: {name}, weight: {weight}, normalise: group}}"
            for name, weight in weights.items()
        ]
        run, _ = make_run(
            "reward.model=null", f"reward.mix=[{', '.join(mix)}]", f"reward.path={tmp_path}",
            "ppo.advantage=grpo", "rollout.per_prompt=4", "kl.beta=0", "log.arrays=8", *overrides,
        )  # fmt: skip
        return train_step(run, 1)

    return take


def normalised(scores):
    groups = [scores[i : i + 4] for i in range(0, len(scores), 4)]
    return [
        (s - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        for group in groups
        for s in group
    ]


def test_advantages_are_of_normalised_sources_and_samples_show_the_plain_sum(step_of):
    weights = {"length": 0.5, "letters": 2.0}
    metrics, samples = step_of(weights, "ppo.scale_rewards=batch", "rollout.max_new_tokens=24")
    assert [s.score for s in samples] == [
        0.5 * s.parts["length"] + 2 * s.parts["letters"] for s in samples
    ]
    assert metrics["objective/scores"] == pytest.approx(statistics.mean(s.score for s in samples))
    sources = [normalised([s.parts[name] for s in samples]) for name in weights]
    sums = [0.5 * a + 2 * b for a, b in zip(*sources, strict=True)]
    want = [x / (statistics.stdev(sums) + 1e-4) for x in sums]
    assert max(want) > 0.5
    for sample, advantage in zip(samples, want, strict=True):
        assert sample.arrays.advantage == pytest.approx([advantage] * sample.length, abs=1e-5)


def test_a_prompt_whose_normalised_scores_vary_is_not_replaced_though_their_plain_sum_is_constant(
    step_of,
):
    metrics, samples = step_of({"first": 1.0, "others": 2.0}, "rollout.dynamic=true")
    assert {s.score for s in samples} == {2.0}
    assert metrics["val/redrawn_prompts"] == 0
    assert metrics["objective/zero_std_frac"] == 0
    assert metrics["objective/group_std"] == 0
    assert metrics["advantages/std"] > 0.5
