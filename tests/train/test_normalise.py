"""Scores as the policy is trained with them: normalised, clipped, less penalties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.sections.reward import OverlongConfig, RewardConfig
from engine.errors import RewardError
from engine.train.rewards.normalise import Normaliser, group_scales

SCORES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 0.25, -7.5, 1000.0]))


def trained_scores(normaliser, raw, lengths=None, limit=8, **of_reward):
    n = len(raw)
    lengths = torch.ones(n, dtype=torch.int64) if lengths is None else torch.tensor(lengths)
    ended = torch.ones(n, dtype=torch.bool)
    return normaliser(raw, RewardConfig(**of_reward), ended, lengths, limit)


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20))
def test_normalised_reference_scores_have_mean_0_and_deviation_1(values):
    raw = torch.tensor(values)
    if float(raw.std(correction=0)) < 1e-3:
        return
    got = trained_scores(Normaliser.of(raw), raw)
    assert float(got.mean()) == pytest.approx(0, abs=1e-2)
    assert float(got.std(correction=0)) == pytest.approx(1, abs=1e-2)


def test_scores_are_clipped_after_normalising():
    raw = torch.tensor([30.0, 10.0, -30.0])
    got = trained_scores(Normaliser(10.0, 2.0), raw, clip=3.0)
    assert got.tolist() == [3.0, 0.0, -3.0]


@pytest.mark.parametrize("score", [math.pi, 1.3, 100.7])
def test_scores_that_do_not_vary_cannot_be_normalised(score):
    with pytest.raises(RewardError, match="scores that vary"):
        Normaliser.of(torch.full((64,), score))


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("same", r"needs scores that vary, but every response of the reference got 2: "),
        ("nothing", r"needs scores, but 'two' scored no response of the reference: "),
    ],
)
def test_a_source_that_cannot_be_normalised_is_named_by_its_key(
    make_run, tmp_path, function, problem
):
    (tmp_path / "unvaried.py").write_text(
        "def same(completions, **_):\n    return [2.0] * len(completions)\n"
        "def nothing(completions, **_):\n    return [None] * len(completions)\n"
    )
    mix = (
        "{model: 'starter:reward'}",
        f"{{function: 'unvaried:{function}', name: two, normalise: reference}}",
    )
    key = r"reward\.mix\[1\]\.normalise"
    with pytest.raises(RewardError, match=rf"^{key}: reference {problem}use {key}: none$"):
        make_run(
            "reward.model=null", f"reward.mix=[{', '.join(mix)}]", f"reward.path={tmp_path}",
            "reward.normalise_samples=4",
        )  # fmt: skip


@given(
    st.integers(1, 5), st.lists(st.lists(SCORES, min_size=5, max_size=5), min_size=1, max_size=4)
)
def test_scores_normalised_in_groups_are_deviations_from_the_group_s_mean(per_prompt, rows):
    groups = [row[:per_prompt] for row in rows]
    want = []
    for group in groups:
        given_scores = [s for s in group if s is not None]
        mean = math.fsum(given_scores) / max(1, len(given_scores))
        squares = math.fsum((s - mean) ** 2 for s in given_scores)
        std = math.sqrt(squares / (len(given_scores) - 1)) if len(given_scores) > 1 else 0.0
        want += [None if s is None else (s - mean) / (std + 1e-4) for s in group]
    scores = [s for group in groups for s in group]
    got = [
        None if s is None else (s - mean) / deviation
        for s, (mean, deviation) in zip(scores, group_scales(scores, per_prompt), strict=True)
    ]
    assert [s is None for s in got] == [s is None for s in want]
    for ours, theirs in zip(got, want, strict=True):
        assert ours is None or ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)


@given(st.integers(1, 40), st.integers(1, 60), st.floats(0, 4, width=16))
def test_the_overlong_penalty_rises_linearly_over_the_buffer(buffer, length, penalty):
    limit = 40
    length = min(length, limit)
    want = max(0.0, penalty * (length - (limit - buffer)) / buffer)
    overlong = OverlongConfig(buffer=buffer, penalty=penalty)
    got = trained_scores(
        Normaliser(), torch.tensor([2.0]), lengths=[length], limit=limit, overlong=overlong
    )
    assert float(got) == pytest.approx(2.0 - want, abs=1e-5)
