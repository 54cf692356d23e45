"""One rank, two with DDP and two with FSDP2 learn the same from the same rollout.

Real processes under torchrun, over gloo on the CPU. The rollout is recorded: live, a difference in
the last bit can flip a sampled token and send two runs on different ways.
"""

import json
import pickle
import subprocess
import sys
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
from engine.train.load import check_rank_count, load_run
from engine.train.step import generate_rollout, train_step

SCRIPT = Path(__file__).parent / "ranks" / "steps.py"
DEADLINE = 400
STEP = (
    "rollout.batch_size=10", "rollout.max_new_tokens=16", "ppo.epochs=2", "ppo.minibatches=2",
    "ppo.micro_batch_size=2", "train.learning_rate=1e-3", "kl.horizon=100", "launch.threads=1",
    "launch.device=cpu", "log.tensorboard=false",
)  # fmt: skip
"""Five rows a minibatch in twos: one rank has two micro-batches where the other has one."""
VARIANTS = {
    "gae": ("ppo.advantage=gae",),
    "gae, a value trunk of its own": ("ppo.advantage=gae", "model.value=separate"),
    "gae, the value warming up": ("ppo.advantage=gae", "ppo.value_warmup=1"),
    "gae, activations computed again": ("parallel.activation_checkpointing=true",),
    "reward": ("ppo.advantage=reward",),
    "rloo": ("ppo.advantage=rloo", "rollout.per_prompt=2"),
    "gae, adapters": ("ppo.advantage=gae", "lora.rank=4"),
    "gae, a value trunk of its own, adapters": ("model.value=separate", "lora.rank=4"),
    "reward, adapters": ("ppo.advantage=reward", "lora.rank=4"),
    "rloo, adapters": ("ppo.advantage=rloo", "rollout.per_prompt=2", "lora.rank=4"),
}
WAYS = ("ddp", "fsdp")


def config_of(way, variant):
    given = [*STEP, f"parallel.strategy={way}", *VARIANTS[variant]]
    return config_file.load(starter.FOLDER / "demo.yaml", given)


def one_process(session):
    config = session.config()
    begin = Begin(attempt=1, from_step=0)
    return load_run(session, config, begin, RankGroup(config.launch), lambda *_: lambda *_: None)


def weights(run):
    return {k: p.detach().clone() for k, p in run.policy.named_parameters()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By variant and way, what one step made of a rollout: metrics and weights."""
    folder = tmp_path_factory.mktemp("ranks")
    found, jobs = {}, []
    for i, variant in enumerate(VARIANTS):
        rollout = record(folder, f"recording-{i}", variant)
        run = one_process(create(folder, f"one-{i}", config_of("auto", variant)))
        before = weights(run)
        metrics, _ = train_step(run, 1, rollout)
        found[variant, "before"], found[variant, "one"] = ({}, before), (metrics, weights(run))
        for way in WAYS:
            session = create(folder, f"{way}-{i}", config_of(way, variant))
            job = {"session": session.folder, "recorded": folder / f"recording-{i}.pickle"}
            jobs.append(job | {"result": folder / f"{way}-{i}.json", "as": (variant, way)})
    on_two_ranks(folder, [{k: str(v) for k, v in job.items()} for job in jobs])
    for job in jobs:
        metrics = json.loads(job["result"].read_text())
        found[job["as"]] = (metrics, load_file(f"{job['result']}.safetensors"))
    return found


def record(folder, name, variant):
    """Answers of a policy that has learnt a little, so that neither KL nor log-ratio is 0."""
    run = one_process(create(folder, name, config_of("auto", variant)))
    train_step(run, 1)
    rollout = generate_rollout(run, 2, lambda _done, _total: None)
    assert len(set(rollout.lengths.tolist())) > 2, "the answers must differ in length"
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(rollout))
    return rollout


def on_two_ranks(folder, jobs):
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            SCRIPT, path,
        ],
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[:4000]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("gpu-box", True, ""), "sees a GPU on gpu-box and none on"),
        (("gpu-box", False, "launch.device: cuda, but"), "on gpu-box: launch.device: cuda"),
    ],
)
def test_a_machine_with_another_kind_of_device_is_told_before_ranks_wait(other, says):
    store = dist.HashStore()
    store.set("device/1", json.dumps(other))
    with pytest.raises(UserInputError, match=says):
        agree_on_device(store, 0, 2, on_gpu=False, problem="")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rollout.batch_size=4", "rollout.batch_size"),
        ("reward.normalise=reference", "reward.normalise_samples"),
    ],
)
def test_more_ranks_than_there_is_work_for_are_one_sentence(override, key):
    given = ["ppo.minibatches=1", "reward.normalise_samples=6", override]
    config = config_file.load(starter.FOLDER / "demo.yaml", given)
    check_rank_count(config, 4)
    with pytest.raises(UserInputError, match=key):
        check_rank_count(config, 7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_have_the_losses_gradients_and_kl_of_one(outcomes, variant, way):
    one, two = outcomes[variant, "one"][0], outcomes[variant, way][0]
    if "warming" not in variant:
        assert abs(one["objective/kl"]) > 1e-3  # of 10 answers: it may be negative
    assert one["grad_norm"] > 0
    for name, value in one.items():
        if not name.startswith(("time/", "perf/")):
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_end_with_the_parameters_of_one(outcomes, variant, way):
    one, two = outcomes[variant, "one"][1], outcomes[variant, way][1]
    assert one.keys() == two.keys()
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_moved_the_parameters_by_more_than_they_may_differ(outcomes, variant):
    before, after = outcomes[variant, "before"][1], outcomes[variant, "one"][1]
    with torch.no_grad():
        assert max(float((before[k] - after[k]).abs().max()) for k in before) > 5e-4
