"""The metrics of a step are those that engine/metrics.py declares."""

from engine import metrics
from engine.protocol.rank_messages import Begin
from engine.train.boundary import Boundary
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.link import Link
from engine.train.step import train_step
from tests.train.architectures import write_model
from tests.train.arithmetic import CHATTING

EVERYTHING = (
    "ppo.entropy_coef=0.01",
    "ppo.entropy_target=100",
    "ppo.dual_clip=3",
    "ppo.off_policy_mask=0.5",
    "ppo.top_entropy=0.5",
    "kl.place=loss",
    "kl.estimator=k3",
    "rollout.per_prompt=2",
    "rollout.dynamic=true",
    "ppo.rollout_correction=truncate",
    "ppo.rollout_rejection=token_k3",
    "ppo.rollout_rejection_limit=0.01",
    "train.ema.decay=0.9",
)
NOT_NATIVE = {"time/sync"}
"""Only with a rollout engine of its own; test_rollout_engine.py has it."""
TWO_SOURCES = (
    "reward.model=null",
    "reward.mix=[{model: 'starter:reward', name: a}, {model: 'starter:reward', name: b}]",
)


def test_a_step_returns_every_declared_metric_and_no_other(make_run, tmp_path):
    run, session = make_run(*TWO_SOURCES, *EVERYTHING, "eval={every: 1, holdout: 2, per_prompt: 2}")
    found, _ = train_step(run, 1)
    found |= evaluate_if_due(run, 1).metrics
    boundary = Boundary(session, run, Begin(attempt=1, from_step=0), Link(0))
    boundary.after_step(1, found, 0.1)
    boundary.close()
    # No estimator has every metric, no value function, and an environment excludes others.
    experts = [f"model.policy={write_model(tmp_path / 'moe', 'qwen3_moe')}", "ppo.router_coef=1"]
    for overrides in (["ppo.advantage=remax"], ["model.value=reward_model"], CHATTING, experts):
        other, _ = make_run(*overrides)
        found |= train_step(other, 1)[0]
    undeclared = {name for name in found if metrics.declaration(name) is None}
    assert not undeclared, "declare them in engine/metrics.py"
    covered = {metrics.describe(name).name for name in found}
    assert covered == {metric.name for metric in metrics.METRICS} - NOT_NATIVE
    assert {"reward/a", "reward/b", "eval/reward/a"} <= set(found)
