"""One rank, two ranks with DDP and two with FSDP2 compute the same step from the same rollout.

The ranks are processes of their own, over gloo on the CPU. The rollout is recorded: otherwise a
difference in the last bit could change a sampled token, and the runs would diverge.
"""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from engine import starter
from engine.config import file as config_file
from engine.errors import UserInputError
from engine.protocol.rank_messages import Begin
from engine.session.folder import create
from engine.train.distributed.ranks import RankGroup, agree_on_device
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.experience.generation import generate_rollout
from engine.train.load import load_run
from engine.train.load_checks import check_rank_count
from engine.train.ppo.chunked_loss import MAX_LOGITS
from engine.train.reports.probe import answer_probe
from engine.train.reward_scales import fit_scales
from engine.train.step import train_step
from tests.train.ranks.launch import run_ranks
from tests.train.repeating import ENVIRONMENT, STOPS

SCRIPT = Path(__file__).parent / "ranks" / "steps.py"
STEP = (
    "rollout.batch_size=10", "rollout.max_new_tokens=16", "ppo.epochs=2", "ppo.minibatches=2",
    "ppo.micro_batch_size=2", "train.learning_rate=1e-3", "kl.horizon=100", "launch.threads=1",
    "launch.device=cpu", "log.tensorboard=false",
)  # fmt: skip
"""Minibatches of 5 rows, micro-batches of 2: one rank has two micro-batches, the other one."""
VARIANTS = {
    "gae": ("ppo.advantage=gae",),
    "gae, separate value trunk": ("ppo.advantage=gae", "model.value=separate"),
    "gae, value warm-up": ("ppo.advantage=gae", "ppo.value_warmup=1"),
    "gae, activation checkpointing, averaged policy": (
        "parallel.activation_checkpointing=true",
        "train.ema.decay=0.5",
        "eval={every: 1, holdout: 4, max_new_tokens: 4}",
    ),
    "gae, an environment, averaged policy": (
        *ENVIRONMENT,
        STOPS,
        "ppo.micro_batch_by=tokens",
        "train.ema.decay=0.5",
        "eval={every: 1, holdout: 4, max_new_tokens: 8}",
    ),
    "reward": ("ppo.advantage=reward",),
    "rloo, 8-bit moments": (
        "ppo.advantage=rloo",
        "rollout.per_prompt=2",
        "train.optimiser=adamw_8bit",
    ),
    "grpo, every term in the loss": (
        "ppo.advantage=grpo",
        "rollout.per_prompt=2",
        "ppo.loss_aggregation=sequence",
        "kl.place=loss",
        "kl.estimator=k3",
        "ppo.entropy_coef=0.1",
        "ppo.dual_clip=1.5",
        "ppo.micro_batch_by=tokens",
    ),
    "grpo, tokens left out, divergence bounded": (
        "ppo.advantage=grpo",
        "rollout.per_prompt=2",
        "ppo.policy_loss=dppo_kl",
        "ppo.clip_range=0.001",
        "ppo.clip_cov=0.2",
        "ppo.clip_cov_range=[-1, 5]",
        "ppo.micro_batch_by=tokens",
    ),
    "grpo, tokens held back, means of ratios": (
        "ppo.advantage=grpo",
        "rollout.per_prompt=2",
        "ppo.policy_loss=gmpo",
        "ppo.ratio=sequence_mean",
        "ppo.loss_aggregation=sequence_sum",
        "ppo.kl_cov=0.2",
        "kl.place=loss",
        "kl.estimator=abs",
    ),
    "gae, separate value trunk, its own rate and clipping": (
        "model.value=separate",
        "ppo.value_rate=3",
        "ppo.value_max_grad_norm=0.1",
        "ppo.whiten_scale=false",
        "ppo.policy_loss=dro",
        "ppo.dro_beta=0.5",
    ),
    "gae, value function from the reward model": (
        "model.value=separate",
        "ppo.value_init=reward_model",
    ),
    "gae, value function on the states of the reward model": ("model.value=reward_model",),
    "remax": ("ppo.advantage=remax", "rollout.per_prompt=2"),
    "optimal token baseline": ("ppo.advantage=optimal_token_baseline", "rollout.per_prompt=2"),
    "gae, adapters": ("ppo.advantage=gae", "lora.rank=4"),
    "gae, separate value trunk, adapters": ("model.value=separate", "lora.rank=4"),
    "reward, adapters": ("ppo.advantage=reward", "lora={rank: 4, rslora: true}"),
    "gae, DoRA": ("ppo.advantage=gae", "lora={rank: 4, dora: true}"),
    "rloo, adapters": ("ppo.advantage=rloo", "rollout.per_prompt=2", "lora.rank=4"),
}
RECIPES = {
    f"{path.stem} recipe{', warm-up' if 'value_warmup' in text else ''}": path
    for path in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    if "(arXiv " in (text := path.read_text(encoding="utf-8"))
}
"""The configurations of papers, by the name of their variant."""
VARIANTS |= dict.fromkeys(RECIPES, ("rollout.batch_size=16", "reward.normalise_samples=16"))
VARIANTS["gdpo recipe"] += ("reward.model=null",)  # it has a mix, with the starter's reward model
STRATEGIES = ("ddp", "fsdp")
NOT_SHARDED = ("gae, DoRA",)
"""Variants that are refused with `fsdp`."""
EVERY_TIME = {
    "gae, activation checkpointing, averaged policy": "fsdp",
    "grpo, every term in the loss": "ddp",
    "gae, separate value trunk, adapters": "fsdp",
    "gae, an environment, averaged policy": "ddp",
}
"""Together they have every part of the loss, the trunk and adapters, each with one of the
strategies; `make test-all` has all with both."""
IN_CHUNKS = 20_000
"""Logits at a time, about five tokens, in the last two of these; one rank has them at once."""

JOBS_OF_A_GROUP = 8
"""The deadline of a group of ranks is for few steps: all the variants take minutes."""


def marks(every_time):
    return () if every_time else pytest.mark.slow


variants = pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=marks(v in EVERY_TIME)) for v in VARIANTS]
)
layouts = pytest.mark.parametrize(
    ("variant", "strategy"),
    [
        pytest.param(variant, strategy, marks=marks(EVERY_TIME.get(variant) == strategy))
        for variant in VARIANTS
        for strategy in STRATEGIES
        if strategy == "ddp" or variant not in NOT_SHARDED
    ],
)


def config_of(strategy, variant, models):
    given = [*STEP, *models, f"parallel.strategy={strategy}", *VARIANTS[variant]]
    return config_file.load(RECIPES.get(variant, starter.FOLDER / "demo.yaml"), given)


def one_process(session):
    config = session.config()
    begin = Begin(attempt=1, from_step=0)
    run = load_run(session, config, begin, RankGroup(config.launch))
    fit_scales(run, config)
    return run


def weights(run):
    found = {k: p.detach().clone() for k, p in run.policy.named_parameters()}
    if run.state.value_weights:
        found["fitted value"] = torch.tensor(run.state.value_weights)
    if run.average is not None:
        found |= {f"ema/{k}": t.clone() for k, t in run.average.tensors(run.policy).items()}
    return found


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory, half_models):
    """Metrics and weights after one step, and a probe before, by variant and by how the ranks run.

    Only of the variants and strategies that some selected test needs. At "printed", the output of
    all ranks.
    """
    folder = tmp_path_factory.mktemp("ranks")
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    params = [spec.params for spec in specs if spec]
    needed = {p["variant"] for p in params if "variant" in p}
    placed = {(p["variant"], p["strategy"]) for p in params if {"variant", "strategy"} <= p.keys()}
    found, jobs = {}, []
    for i, variant in enumerate(v for v in VARIANTS if v in needed):
        alone = config_of("auto", variant, half_models)
        rollout = record(folder, f"recording-{i}", alone)
        run = one_process(create(folder, f"one-{i}", alone))
        before, probe = weights(run), answer_probe(run, run.prompts.for_step(1)[0].text)
        metrics, _ = train_step(run, 1, rollout)
        metrics |= evaluate_if_due(run, 1).metrics
        found[variant, "before"] = ({}, before, probe)
        found[variant, "one"] = (metrics, weights(run), probe)
        for strategy in (s for s in STRATEGIES if (variant, s) in placed):
            session = create(folder, f"{strategy}-{i}", config_of(strategy, variant, half_models))
            job = {"session": session.folder, "recorded": folder / f"recording-{i}.pickle"}
            job["most_logits"] = IN_CHUNKS if variant in [*EVERY_TIME][1:] else MAX_LOGITS
            jobs.append(
                job | {"result": folder / f"{strategy}-{i}.json", "as": (variant, strategy)}
            )
    printed = on_two_ranks(folder, [{k: str(v) for k, v in job.items()} for job in jobs])
    found["printed"] = printed
    for job in jobs:
        result = json.loads(job["result"].read_text())
        found[job["as"]] = (
            result["metrics"], load_file(f"{job['result']}.safetensors"), result["probe"]
        )  # fmt: skip
    return found


def record(folder, name, config):
    """A rollout of a policy after one step, so that neither the KL nor the log-ratio is 0."""
    run = one_process(create(folder, name, config))
    train_step(run, 1)
    rollout = generate_rollout(run, 2)
    assert len(set(rollout.lengths.tolist())) > 2, "the responses must differ in length"
    if (conversation := rollout.conversation) is not None:  # rank 1 cannot import its objects
        turns = [replace(turns, environment=None) for turns in conversation.turns]
        rollout = replace(rollout, conversation=replace(conversation, turns=turns))
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(rollout))
    return rollout


def on_two_ranks(folder, jobs):
    """Returns what the ranks printed."""
    printed = ""
    for first in range(0, len(jobs), JOBS_OF_A_GROUP):
        path = folder / f"jobs-{first}.json"
        path.write_text(json.dumps(jobs[first : first + JOBS_OF_A_GROUP]))
        done = run_ranks(2, SCRIPT, path, folder=folder)
        assert done.code == 0, done.output
        printed += done.output
    return printed


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("gpu-box", True, ""), "sees a GPU on gpu-box and none on"),
        (("gpu-box", False, "launch.device: cuda, but"), "on gpu-box: launch.device: cuda"),
    ],
)
def test_a_machine_with_another_kind_of_device_is_an_error_before_any_collective(other, message):
    store = dist.HashStore()
    store.set("device/1", json.dumps(other))
    with pytest.raises(UserInputError, match=message):
        agree_on_device(store, 0, 2, on_gpu=False, problem="")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.batch_size=4", "rollout.batch_size"),
        ("reward.normalise=reference", "reward.normalise_samples"),
    ],
)
def test_too_many_ranks_for_the_batch_is_an_error_that_names_the_key(override, key):
    given = ["ppo.minibatches=1", "reward.normalise_samples=6", override]
    config = config_file.load(starter.FOLDER / "demo.yaml", given)
    check_rank_count(config, 4)
    with pytest.raises(UserInputError, match=key):
        check_rank_count(config, 7)


@layouts
def test_two_ranks_have_the_losses_gradients_and_kl_of_one(outcomes, variant, strategy):
    one, two = outcomes[variant, "one"][0], outcomes[variant, strategy][0]
    if "warm-up" not in variant:
        assert abs(one["objective/kl"]) > 1e-3  # over 10 responses: it may be negative
    assert one["grad_norm"] > 0
    for name, value in one.items():
        if not name.startswith(("time/", "perf/")):
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@layouts
def test_two_ranks_answer_a_probe_as_one_does(outcomes, variant, strategy):
    """One of them has no response to generate."""
    one, two = json.loads(json.dumps(outcomes[variant, "one"][2])), outcomes[variant, strategy][2]
    assert one["policy"]["response"]
    for name in ("score", "kl"):
        found = [[answers[model].pop(name) for model in answers] for answers in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-4)
    assert one == two


@layouts
def test_two_ranks_end_with_the_parameters_of_one(outcomes, variant, strategy):
    one, two = outcomes[variant, "one"][1], outcomes[variant, strategy][1]
    assert one.keys() == two.keys()
    # A last bit may round a moment to the next of its 256 values.
    allowed = 4e-4 if "8-bit" in variant else 1e-4
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < allowed


@layouts
def test_no_rank_prints_a_warning_of_fsdp(outcomes, variant, strategy):
    """A session's log has what ranks print."""
    assert "--- rank 1" in outcomes["printed"], (variant, strategy)
    assert "FSDP" not in outcomes["printed"]


@variants
def test_the_step_changes_the_parameters_by_more_than_the_tolerance(outcomes, variant):
    before, after = outcomes[variant, "before"][1], outcomes[variant, "one"][1]
    with torch.no_grad():
        assert max(float((before[k] - after[k]).abs().max()) for k in before) > 5e-4
