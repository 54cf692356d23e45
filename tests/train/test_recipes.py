"""The recipes of the papers in examples/ train, and resume bit for bit."""

import math
from pathlib import Path

import pytest
import torch

from engine.config import file as config_file
from engine.protocol.rank_messages import Begin
from engine.train.boundary import Boundary, update_reference
from engine.train.distributed.ranks import RankGroup
from engine.train.link import Link
from engine.train.load import load_run
from engine.train.step import train_step
from tests.train.checkpoints import save_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(
    path.stem for path in EXAMPLES.glob("*.yaml") if "(arXiv " in path.read_text(encoding="utf-8")
)
STEPS = 20
SMALL = (
    "rollout.batch_size=16",
    "rollout.max_new_tokens=12",
    "reward.normalise_samples=16",
    "ppo.micro_batch_size=8",
    "kl.horizon=100",
    "kl.reference_update={every: 5, mix: 0.5}",
    "train.ema.decay=0.9",
    "launch.threads=1",
)


def test_there_is_a_recipe_for_each_paper():
    names = {
        "ppo-ziegler", "ppo-nplus", "grpo", "dr-grpo", "gspo", "gmpo", "gdpo", "dapo",
        "reinforce-plus-plus", "vc-ppo",
    }  # fmt: skip
    assert set(RECIPES) == names


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_twenty_steps_and_resumes_bit_for_bit(name, make_run, assert_same_step):
    config = config_file.load(EXAMPLES / f"{name}.yaml", SMALL)
    run, session = make_run(config=config)
    boundary = Boundary(session, run, Begin(attempt=1, from_step=0), Link(0))
    for step in range(1, STEPS + 1):
        update_reference(run)
        metrics, _ = train_step(run, step)
        assert all(math.isfinite(value) for value in metrics.values()), step
        assert metrics["policy/skipped_updates"] == 0
        boundary.after_step(step, metrics, 0.1)
    boundary.close()
    assert run.state.reference_updated == 15
    assert metrics["objective/kl"] != 0

    save_checkpoint(run, session)
    begin = Begin(attempt=2, from_step=STEPS)
    again = load_run(session, config, begin, RankGroup(config.launch))
    for resumed in (run, again):  # an update falls due before the next step
        update_reference(resumed)
    assert_same_step(run, again, STEPS + 1)
    averages = [r.average.tensors(r.policy) for r in (run, again)]
    for key, weight in averages[0].items():
        assert torch.equal(weight, averages[1][key]), key
