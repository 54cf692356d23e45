"""A budget of what costs time on a GPU: launches, waits of the host, and casts of weights."""

import gc
import weakref
from functools import partial

import pytest
import torch

from engine.train.data.prompts import batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.experience.generation import generate_rollout
from engine.train.ppo.advantages import Targets, generalised_advantages
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.ppo.optimise import backward
from engine.train.rollout.native.backend import generate
from engine.train.rollout.native.decoder import Decoder
from engine.train.rollout.native.schedule import GRAPHED, Schedule
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.step import train_step
from tests.train.architectures import write_model
from tests.train.gpu.pretend import GPU, pretend_gpu
from tests.train.repeating import ENVIRONMENT

TURNS = (*ENVIRONMENT, "rollout.stop=['e', 'a']", "rollout.max_new_tokens=12")
MASK_TESTS = 1
"""Waits of transformers in a forward pass: is anything padded?"""


@pytest.fixture
def on_gpu(make_run, tiny_model, few_prompts):
    """A GPU and a run on it; in bfloat16, which launches more than float32 and has casts."""
    with pretend_gpu() as gpu:
        yield gpu, run_on_gpu(make_run, tiny_model, few_prompts)


@pytest.fixture
def run_with(make_run, tiny_model, few_prompts):
    """Returns a function that makes a run on the GPU with more keys; only inside `pretend_gpu`."""
    return partial(run_on_gpu, make_run, tiny_model, few_prompts)


@pytest.fixture
def experts_on_gpu(make_run, tmp_path, few_prompts):
    """As `on_gpu`, of a mixture of experts."""
    folder = write_model(tmp_path / "experts", "qwen3_moe")
    with pretend_gpu() as gpu:
        yield gpu, run_on_gpu(make_run, folder, few_prompts)


def run_on_gpu(make_run, policy, prompts, *keys):
    run, _ = make_run(
        f"model.policy={policy}", f"data.prompts={prompts}", "ppo.micro_batch_size=2",
        "reward.model=starter:reward", "launch.device=cpu", "ppo.epochs=1", "ppo.minibatches=2",
        "rollout.batch_size=4", "rollout.max_new_tokens=6", "model.dtype=bfloat16", *keys,
        device=GPU,
    )  # fmt: skip
    return run


def casts_of_a_forward_pass(run):
    lm = run.policy.lm
    matrices = sum(1 for p in lm.parameters() if p.dim() > 1)
    return matrices - (not lm.config.tie_word_embeddings)  # an embedding alone is not cast


def endless(run, rows, limit, schedule=None):
    """Responses of `limit` tokens each."""
    batch = batch_prompts(run.prompts.for_step(1)[:rows], 1, 0)
    uniforms = sampling_uniforms(0, 1, rows, limit)
    never = StopCriteria([], [], run.tokenizer)
    request = RolloutRequest(batch, uniforms, 1.0)
    return generate(run.policy, request, never, run.tokenizer, schedule=schedule)


def test_a_token_is_a_launch_and_the_host_looks_every_16_tokens(on_gpu):
    gpu, run = on_gpu
    found = []
    for limit in (33, 65):  # the same captures in both: of the same quarters of the cache
        before = gpu.counts()
        endless(run, 2, limit)
        found.append(gpu.counts() - before)
    more = found[1] - found[0]  # for 32 tokens
    assert more.launches == 32 + 2 * 2  # and two looks
    assert (more.syncs, more.copies, more.casts) == (2, 2, 0)
    assert found[0].casts == casts_of_a_forward_pass(run)


def test_graphs_are_freed_when_a_rollout_ends_and_not_by_the_garbage_collector(on_gpu):
    # Which may run during the next capture: CUDA then fails both.
    gpu, run = on_gpu
    endless(run, 2, 33)
    gc.collect()
    assert gpu.launches["graph"] > 0
    assert gpu.dropped_graphs == 0


def test_advantages_of_a_response_twice_as_long_are_three_launches_more():
    with pretend_gpu() as gpu:
        launches = []
        for width in (512, 1024, 2048):
            rows = torch.zeros(2, width, device=GPU)
            before = gpu.counts()
            generalised_advantages(rows, rows, rows == 0, 0.99, 0.95)
            counted = gpu.counts() - before
            launches.append(counted.launches)
            assert counted.syncs == 0
    assert launches[2] - launches[1] == launches[1] - launches[0] == 3
    assert launches[2] <= 50


def test_a_rollout_leaves_no_cache_for_the_garbage_collector(on_gpu, monkeypatch):
    _, run = on_gpu
    decoders = []
    run_it = Decoder.run

    def watched(self):
        decoders.append(weakref.ref(self))
        return run_it(self)

    monkeypatch.setattr(Decoder, "run", watched)
    gc.collect()
    gc.disable()
    try:
        endless(run, 2, 33)
    finally:
        gc.enable()
    assert [decoder() for decoder in decoders] == [None]


def test_if_a_graph_cannot_be_captured_the_responses_are_the_same_and_the_log_says_so_once(
    on_gpu, monkeypatch, caplog
):
    _, run = on_gpu
    expected = endless(run, 2, 6)

    def refuse(*_args, **_named):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert endless(run, 2, 6).ids.tolist() == expected.ids.tolist()
    assert caplog.text.count("generating without CUDA graphs") == 1


def counts_of_rollouts(gpu, run):
    """What 17 and 33 tokens cost without graphs."""
    found = []
    for limit in (17, 33):
        before = gpu.counts()
        endless(run, 2, limit, Schedule(GRAPHED.check_every, fixed_shapes=False))
        found.append(gpu.counts() - before)
    return found


def test_without_graphs_a_token_costs_the_launches_of_a_forward_pass_and_of_sampling(on_gpu):
    gpu, run = on_gpu
    found = counts_of_rollouts(gpu, run)
    more = found[1] - found[0]
    assert more.launches <= 16 * (60 * run.policy.lm.config.num_hidden_layers + 60)
    assert more.syncs <= 16 + 1  # transformers tests each mask for padding
    assert (more.copies, more.casts) == (1, 0)


def test_experts_are_cast_once_a_rollout_and_not_for_each_token(experts_on_gpu):
    gpu, run = experts_on_gpu
    found = counts_of_rollouts(gpu, run)
    assert [counts.casts for counts in found] == [casts_of_a_forward_pass(run)] * 2


def test_experts_are_cast_once_for_all_micro_batches_that_are_scored(experts_on_gpu):
    gpu, run = experts_on_gpu
    rollout = endless(run, 4, 6)
    found = []
    for rows in (2, 4):  # one micro-batch, and two
        before = gpu.counts()
        score_tokens(
            run.policy, rollout, 1.0, MicroBatchLimit(2), rows=rollout.rows[:rows], want="logits"
        )
        found.append((gpu.counts() - before).casts)
    assert found == [casts_of_a_forward_pass(run)] * 2


def test_the_host_waits_for_the_mask_of_a_micro_batch_and_the_sums_of_a_minibatch(on_gpu):
    gpu, run = on_gpu
    rollout = endless(run, 4, 6)
    old = rollout.logprobs * rollout.mask
    targets = Targets(old, torch.ones_like(old), torch.zeros_like(old), torch.zeros_like(old))

    def train(rows):
        before = gpu.counts()
        backward(run.ranks, run.learner, rollout, targets, rollout.rows[:rows], run.config)
        return gpu.counts() - before

    def score(rows):
        before = gpu.counts()
        score_tokens(
            run.policy, rollout, 1.0, MicroBatchLimit(2), rows=rollout.rows[:rows], want="logits"
        )
        return gpu.counts() - before

    train(2)  # the first makes the gradients
    one = train(2)
    more = train(4) - one
    assert more.syncs <= MASK_TESTS
    assert one.syncs == more.syncs + 1
    assert more.copies <= 2
    assert more.casts == casts_of_a_forward_pass(run)
    assert more.launches <= 500
    more = score(4) - score(2)
    assert more.syncs <= MASK_TESTS
    assert more.casts == 0
    assert more.launches <= 150


def test_a_step_waits_a_fixed_number_of_times_more_than_its_micro_batches(on_gpu):
    gpu, run = on_gpu
    train_step(run, 1)
    before = gpu.counts()
    train_step(run, 2)
    found = gpu.counts() - before
    passes = 3 * 2  # of the reference, of the policy before the update, and of training
    prompts = 2  # padded, so transformers tests their mask twice
    assert found.syncs <= MASK_TESTS * passes + prompts + 2 * run.config.ppo.minibatches + 20
    # Reading a rollout's tokens, scoring, metrics and samples; one rank has one device.
    assert found.copies <= 60


def waits(gpu, place):
    """How often the host has waited at a place, such as a module of the engine."""
    return sum(count for where, count in gpu.syncs.items() if place in where)


@pytest.mark.parametrize("responses", [4, 8])
def test_the_fit_of_a_value_function_waits_no_longer_for_more_responses(run_with, responses):
    with pretend_gpu() as gpu:
        run = run_with("model.value=reward_model", f"rollout.batch_size={responses}")
        train_step(run, 1)
        # The number of tokens, whether the matrix could be factored, and the weights.
        assert waits(gpu, "ppo/linear_value.py") == 3


def test_a_turn_waits_for_its_tokens_and_for_the_policy_to_be_heard(run_with):
    counts = []
    for turns in (1, 3):
        with pretend_gpu() as gpu:
            run = run_with(*TURNS, f"environment.max_turns={turns}")
            generate_rollout(run, 1)  # the first one makes what is kept
            before = gpu.counts()
            rollout = generate_rollout(run, 2)
            counts.append(gpu.counts() - before)
    assert max(turns.count for turns in rollout.conversation.turns) == 3
    more = counts[1] - counts[0]  # for two turns, each of fewer tokens than are looked at together
    # The lengths of prompts, a look (two copies with stop strings), the rollout (two), its copy
    # (three); the prompts' mask is tested twice.
    assert more.syncs <= 2 * (2 * MASK_TESTS + 8)
    assert more.copies <= 2 * 20
    assert more.casts == 2 * casts_of_a_forward_pass(run)
