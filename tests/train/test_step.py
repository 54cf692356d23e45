"""Properties of a training step of the starter model."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from engine import starter
from engine.errors import RlhfError, UserInputError
from engine.train.experience.generation import generate_rollout
from engine.train.experience.model_outputs import squared_probabilities
from engine.train.experience.rollout_check import check_first_rollout
from engine.train.models.language_model import fingerprint
from engine.train.ppo.advantages import Targets
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.ppo.optimise import optimise
from engine.train.reports.probe import answer_probe
from engine.train.reward_scales import reference_responses
from engine.train.rewards.source import RewardInputs
from engine.train.step import train_step
from tests.variants import some_of

VARIANTS = {
    "gae, value head on the trunk": ["ppo.advantage=gae"],
    "gae, separate value trunk": ["ppo.advantage=gae", "model.value=separate"],
    "gae, whitened rewards, clipped values": ["ppo.whiten_rewards=true", "ppo.value_clip=0.2"],
    "reward without baseline": ["ppo.advantage=reward", "ppo.baseline=none"],
    "reward, batch baseline": ["ppo.advantage=reward", "ppo.baseline=batch"],
    "reward, running baseline": ["ppo.advantage=reward", "ppo.baseline=running"],
    "rloo": ["ppo.advantage=rloo", "rollout.per_prompt=4"],
    "rloo, whitened": ["ppo.advantage=rloo", "ppo.whiten=true"],
    "grpo, k3 in the loss": [
        "ppo.advantage=grpo",
        "kl.place=loss",
        "kl.estimator=k3",
        "ppo.loss_aggregation=sequence",
    ],
    "grpo without deviation, constant divisor": [
        "ppo.advantage=grpo",
        "ppo.scale_rewards=none",
        "rollout.per_prompt=4",
        "ppo.loss_aggregation=sequence_sum_constant",
    ],
    "reinforce_plus_plus": ["ppo.advantage=reinforce_plus_plus", "kl.estimator=k2"],
    "opo": ["ppo.advantage=opo", "rollout.per_prompt=2"],
    "optimal_token_baseline": ["ppo.advantage=optimal_token_baseline", "rollout.temperature=0.7"],
    "remax": ["ppo.advantage=remax", "rollout.per_prompt=2", "reward.normalise=reference"],
    "entropy bonus, dual clip, lambdas": [
        "ppo.entropy_coef=0.01",
        "ppo.dual_clip=3",
        "ppo.clip_range_high=0.28",
        "ppo.lam_value=1",
        "ppo.lam_alpha=0.5",
    ],
    "value function from the reward model": [
        "model.value=separate",
        "ppo.value_init=reward_model",
        "reward.normalise=reference",
    ],
    "value function on the states of the reward model": [
        "model.value=reward_model",
        "reward.normalise=reference",
    ],
    "cispo": [
        "ppo.advantage=grpo",
        "ppo.policy_loss=cispo",
        "ppo.clip_range=1",
        "ppo.clip_range_high=4",
    ],
    "sapo": ["ppo.advantage=grpo", "ppo.policy_loss=sapo"],
    "vespo, pass@k": [
        "ppo.advantage=grpo_passk",
        "ppo.policy_loss=vespo",
        "ppo.ratio=sequence",
    ],
    "gmpo": [
        "ppo.advantage=grpo",
        "ppo.policy_loss=gmpo",
        "ppo.ratio=sequence_mean",
        "ppo.clip_range=0.4",
    ],
    "dppo_tv": ["ppo.advantage=grpo", "ppo.policy_loss=dppo_tv", "ppo.clip_range=0.15"],
    "dppo_kl": ["ppo.advantage=grpo", "ppo.policy_loss=dppo_kl", "ppo.clip_range=0.05"],
    "dro": ["ppo.advantage=grpo", "ppo.policy_loss=dro", "ppo.dro_beta=0.1"],
    "clip_cov": ["ppo.advantage=grpo", "ppo.clip_cov=0.05", "ppo.clip_cov_range=[0.01, 1]"],
    "kl_cov": ["ppo.advantage=grpo", "ppo.kl_cov=0.05", "ppo.clip_range=1"],
    "sequence ratio": ["ppo.advantage=reward", "ppo.ratio=sequence"],
}


def parameters(run):
    return {k: v.detach().clone() for k, v in run.policy.named_parameters()}


@pytest.mark.parametrize(
    "overrides",
    some_of(
        VARIANTS,
        "gae, whitened rewards, clipped values",
        "reward, running baseline",
        "rloo, whitened",
        "grpo, k3 in the loss",
        "remax",
        "entropy bonus, dual clip, lambdas",
        "value function from the reward model",
    ),
)
def test_the_first_step_begins_at_the_reference_and_every_metric_is_finite(make_run, overrides):
    run, _ = make_run("ppo.epochs=1", "ppo.minibatches=1", *overrides)
    metrics, samples = train_step(run, 1)
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["policy/clipfrac_avg"] == 0
    assert metrics["policy/skipped_updates"] == 0
    assert all(math.isfinite(v) for v in metrics.values())
    assert len(samples) == 8


@pytest.mark.parametrize("overrides", [[], ["ppo.ratio=sequence", "ppo.entropy_coef=0.01"]])
def test_a_model_that_forbids_the_token_of_the_padding_can_be_trained(make_run, overrides):
    run, _ = make_run("rollout.max_new_tokens=24", *overrides)

    def forbid(_layer, _inputs, logits):
        return logits.index_fill(-1, torch.tensor([0]), -math.inf)

    for model in (run.policy, run.reference):
        model.lm.get_output_embeddings().register_forward_hook(forbid)
    metrics, _ = train_step(run, 1)
    assert metrics["tokens/response_len_mean"] < 24  # so there is padding
    assert metrics["policy/nonfinite_updates"] == 0
    assert all(math.isfinite(v) for v in metrics.values())


def test_a_value_function_from_the_reward_model_begins_with_the_scores_of_training(make_run):
    name = "{model: 'starter:reward', weight: 2.0, normalise: reference}"
    run, _ = make_run(
        "model.value=separate", "ppo.value_init=reward_model", "reward.normalise=reference",
        "reward.model=null", f"reward.mix=[{name}]", "reward.normalise_samples=8",
    )  # fmt: skip
    assert list(run.state.reward_scales) == ["reward"]
    assert run.config.ppo.value_head_rate == 1
    rollout = rollout_of(run)
    inputs = RewardInputs.of(rollout, 1)
    raw = run.rewards(inputs).total
    want = (raw - run.state.reward_mean) / run.state.reward_std
    for i, prompt in enumerate(inputs.batch.prompts):
        ids = torch.tensor([prompt.ids + inputs.ids[i]])
        values = run.policy(ids, torch.ones_like(ids), 1, want="values").values
        assert float(values) == pytest.approx(float(want[i]), abs=1e-4)


def test_the_kl_with_recomputed_log_probabilities_is_zero_before_the_first_update(shared_run):
    run, _ = shared_run()
    rollout = rollout_of(run)
    policy, _ = score_tokens(run.policy, rollout, 1.0, MicroBatchLimit(8))
    reference, _ = score_tokens(run.reference, rollout, 1.0, MicroBatchLimit(8))
    assert (policy - reference).sum(1).abs().max() < 1e-6


def test_squared_probabilities_are_those_of_the_whole_distribution(make_run):
    run, _ = make_run("rollout.temperature=0.7", "ppo.micro_batch_size=3")
    rollout = rollout_of(run)
    old = rollout.logprobs * rollout.mask
    got = squared_probabilities(run, rollout, old, rollout.rows)
    for i, prompt in enumerate(rollout.batch.prompts):
        n = int(rollout.lengths[i])
        ids = torch.tensor([prompt.ids + rollout.ids[i, : n - 1].tolist()])
        with torch.no_grad():
            logits = run.policy(ids, torch.ones_like(ids), n, want="logits").logits
        want = ((logits[0] / 0.7).softmax(-1) ** 2).sum(-1)
        torch.testing.assert_close(got[i, :n], want, rtol=2e-3, atol=1e-6)
        assert not got[i, n:].any()


def test_the_reference_is_untouched_by_training(make_run):
    run, _ = make_run()
    before = fingerprint(run.reference)
    train_step(run, 1)
    assert fingerprint(run.reference) == before == run.state.reference
    assert fingerprint(run.policy.lm) != fingerprint(run.reference.lm)


def test_micro_batches_change_memory_and_not_the_result(make_run):
    whole, _ = make_run("ppo.micro_batch_size=8", "ppo.minibatches=1", "train.learning_rate=1e-5")
    parts, _ = make_run("ppo.micro_batch_size=2", "ppo.minibatches=1", "train.learning_rate=1e-5")
    ours, _ = train_step(whole, 1)
    theirs, _ = train_step(parts, 1)
    for name, value in ours.items():
        if not name.startswith(("time/", "perf/")):
            assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    ours, theirs = parameters(whole), parameters(parts)
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 2e-5


def test_a_step_depends_on_seed_and_number_alone(make_run):
    one, _ = make_run()
    two, _ = make_run()
    other, _ = make_run("seed=1")
    texts = [[s.response for s in train_step(run, 1)[1]] for run in (one, two, other)]
    assert texts[0] == texts[1] != texts[2]


def test_during_value_warm_up_the_policy_does_not_change(make_run):
    run, _ = make_run("ppo.value_warmup=1")
    before = parameters(run)
    train_step(run, 1)
    after = parameters(run)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"value_head.weight", "value_head.bias"}
    train_step(run, 2)
    assert not torch.equal(run.policy.lm.lm_head.weight, before["lm.model.embed_tokens.weight"])


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_the_value_head_rate_scales_the_updates_of_the_value_head_only(make_run, value):
    one_update = ["ppo.epochs=1", "ppo.minibatches=1", f"model.value={value}"]
    moved = {}
    for rate in (1, 8):
        run, _ = make_run(*one_update, f"ppo.value_head_rate={rate}")
        before = parameters(run)
        train_step(run, 1)
        moved[rate] = {k: v - before[k] for k, v in parameters(run).items()}
    for name, by in moved[1].items():
        times = 8 if name.startswith("value_head.") else 1
        assert by.any() or name.startswith(
            "value_trunk."
        )  # a value head of zeros passes no gradient on
        torch.testing.assert_close(moved[8][name], times * by, rtol=1e-5, atol=0)


def test_the_value_rate_scales_the_updates_of_the_second_transformer_only(make_run):
    one_update = ["ppo.epochs=1", "ppo.minibatches=1", "model.value=separate"]
    moved = {}
    for rate in (1, 8):
        init = "ppo.value_init=reward_model"  # a head of zeros would pass no gradient on
        run, _ = make_run(*one_update, init, "ppo.value_head_rate=1", f"ppo.value_rate={rate}")
        before = parameters(run)
        train_step(run, 1)
        moved[rate] = {k: v - before[k] for k, v in parameters(run).items()}
    for name, by in moved[1].items():
        times = 8 if name.startswith("value_trunk.") else 1
        assert by.any(), name
        torch.testing.assert_close(moved[8][name], times * by, rtol=0, atol=2e-6, msg=name)


def test_the_epochs_end_when_the_policy_is_far_from_the_rollouts(make_run):
    run, _ = make_run("ppo.stop_kl=1e-6", "train.learning_rate=1e-3")
    stats = optimise_once(run)
    assert 0 < stats.updates < 4
    assert stats.skipped == 0


def test_responses_longer_than_the_models_positions_are_refused(make_run):
    with pytest.raises(UserInputError, match=r"rollout.max_new_tokens \(300\) must be at most \d+"):
        make_run("rollout.max_new_tokens=300")


def test_responses_longer_than_the_references_positions_are_refused(make_run, tmp_path):
    policy = AutoConfig.from_pretrained(starter.resolve("starter:policy"))
    shape = GPT2Config(vocab_size=policy.vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    with pytest.raises(UserInputError, match=r"must be at most \d+: the models have no"):
        make_run(f"model.reference={tmp_path}", "rollout.max_new_tokens=60")


def test_prompts_that_leave_no_position_for_a_response_are_refused(make_run, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "film " * 400}) + "\n")
    with pytest.raises(UserInputError, match=r"leaves none .* lower data\.max_prompt_tokens"):
        make_run(f"data.prompts={prompts}")


def test_a_non_finite_minibatch_is_skipped_and_counted(shared_run):
    run, _ = shared_run()
    before = parameters(run)
    stats = optimise_once(run, poison=math.inf)
    after = parameters(run)
    assert stats.skipped == 4
    assert stats.updates == 0
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_minibatch_with_a_large_mean_ratio_is_skipped(shared_run):
    run, _ = shared_run()
    rollout = rollout_of(run)
    far = rollout.logprobs * rollout.mask - 5.0
    targets = Targets(far, torch.ones_like(far), torch.zeros_like(far), torch.zeros_like(far))
    stats = optimise(
        run.ranks, run.learner, run.optimiser, rollout, targets, run.config,
        seed=0, step=1,
    )  # fmt: skip
    assert stats.updates == 0
    assert stats.skipped == 4


def test_bfloat16_recomputes_the_old_log_probabilities_and_trains(make_run):
    run, _ = make_run("model.dtype=bfloat16", "ppo.epochs=1", "ppo.minibatches=1")
    metrics, _ = train_step(run, 1)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-3)
    assert 0 < metrics["val/rollout_logprob_gap"] < 0.5
    assert all(p.dtype is torch.float32 for p in run.policy.parameters())


@pytest.mark.parametrize(("off", "refused"), [(1, False), (20, True)])
def test_in_bfloat16_single_tokens_may_differ_while_a_whole_response_may_not(
    make_run, off, refused
):
    run, _ = make_run("model.dtype=bfloat16", "rollout.max_new_tokens=20")
    rollout = rollout_of(run)
    rollout.logprobs[0, :off] -= 2.0
    assert rollout.lengths[0] > 10
    kl = torch.zeros_like(rollout.logprobs)
    if refused:
        with pytest.raises(RlhfError, match="differ by 2 nats per token"):
            check_first_rollout(run, rollout, kl, kl)
    else:
        check_first_rollout(run, rollout, kl, kl)


@pytest.mark.parametrize(("temperature", "refused"), [(1.0, True), (0.01, False)])
def test_a_low_temperature_makes_the_rounding_larger_that_is_accepted(
    make_run, temperature, refused
):
    run, _ = make_run(f"rollout.temperature={temperature}", "rollout.max_new_tokens=60")
    rollout = rollout_of(run)
    rollout.logprobs[0, 0] -= 1e-3
    kl = torch.zeros_like(rollout.logprobs)
    if refused:
        with pytest.raises(RlhfError, match=r"differ by 0\.001 nats on a token"):
            check_first_rollout(run, rollout, kl, kl)
    else:
        check_first_rollout(run, rollout, kl, kl)


def test_a_policy_whose_weights_are_not_finite_is_not_called_an_unsafe_architecture(make_run):
    run, _ = make_run()
    with torch.no_grad():
        run.policy.lm.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(RlhfError, match=r"not finite before the update of step 1: its weights are"):
        train_step(run, 1)


@pytest.mark.parametrize("lora", [(), ("lora.rank=4",)], ids=["all weights", "adapters"])
def test_float32_logits_are_not_rounded_to_the_dtype_of_the_trunk(make_run, lora):
    run, _ = make_run(
        "model.dtype=bfloat16", "model.float32_logits=true", "ppo.epochs=1", "ppo.minibatches=1",
        *lora,
    )  # fmt: skip
    rollout = rollout_of(run)
    for model in (run.policy, run.reference):
        logits = model(rollout.ids, rollout.mask.long(), 1, want="logits").logits
        assert logits.dtype is torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())
    metrics, _ = train_step(run, 1)
    assert 0 < metrics["val/rollout_logprob_gap"] < 0.5
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-3)


def test_a_response_also_ends_at_a_stop_string(make_run):
    run, _ = make_run("rollout.stop=[' the', 'e']", "rollout.max_new_tokens=20")
    rollout = rollout_of(run)
    for i in (rollout.ended & ~rollout.eos).nonzero().squeeze(1).tolist():
        before = run.tokenizer.decode(rollout.ids[i, : int(rollout.lengths[i]) - 1])
        assert "e" in rollout.texts[i]
        assert "e" not in before
    assert (rollout.ended & ~rollout.eos).any()


@pytest.mark.parametrize(("overrides", "some_end"), [((), False), (("rollout.stop=[e]",), True)])
def test_with_mask_truncated_only_responses_that_ended_move_the_policy(
    make_run, overrides, some_end
):
    run, _ = make_run(
        "ppo.advantage=reward", "ppo.mask_truncated=true", "rollout.max_new_tokens=2", *overrides
    )
    metrics, _ = train_step(run, 1)
    assert (metrics["tokens/truncated_frac"] < 1) == some_end
    assert (metrics["grad_norm"] > 0) == some_end


def test_a_truncated_response_gets_the_penalty(make_run):
    plain, _ = make_run("rollout.max_new_tokens=3")
    penalised, _ = make_run("rollout.max_new_tokens=3", "reward.missing_eos_penalty=2.5")
    ours, theirs = train_step(plain, 1), train_step(penalised, 1)
    for one, two in zip(ours[1], theirs[1], strict=True):
        assert two.score == pytest.approx(one.score - (0.0 if one.ended else 2.5), abs=1e-5)
    assert ours[0]["tokens/truncated_frac"] > 0


def test_recomputed_activations_are_not_saved_for_the_backward_pass(make_run):
    saved = {}
    for recompute in ("false", "true"):
        run, _ = make_run(f"parallel.activation_checkpointing={recompute}", "ppo.epochs=1")
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train_step(run, 1)
        saved[recompute] = sum(sizes)
        assert not run.policy.training
    assert saved["true"] < 0.7 * saved["false"]


def rollout_of(run):
    return generate_rollout(run, 1)


def optimise_once(run, poison=1.0):
    rollout = rollout_of(run)
    old = rollout.logprobs * rollout.mask
    advantages = torch.full_like(old, poison)
    targets = Targets(old, advantages, torch.zeros_like(old), torch.zeros_like(old))
    return optimise(
        run.ranks, run.learner, run.optimiser, rollout, targets, run.config,
        seed=0, step=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "overrides", [("ppo.advantage=reward", "ppo.baseline=running"), ("model.value=reward_model",)]
)
def test_a_step_whose_numbers_are_not_finite_leaves_nothing_to_the_next(make_run, overrides):
    run, _ = make_run(*overrides)
    train_step(run, 1)
    kept = run.state.baseline, run.state.value_weights
    weight = next(run.reference.parameters())
    values = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    assert train_step(run, 2)[0]["policy/nonfinite_updates"] == 4
    assert (run.state.baseline, run.state.value_weights) == kept
    with torch.no_grad():
        weight.copy_(values)
    assert train_step(run, 3)[0]["policy/nonfinite_updates"] == 0


@pytest.mark.parametrize("override", ["model.dtype=bfloat16", "model.value=separate"])
def test_a_pass_of_the_policy_reports_its_progress_like_that_of_the_reference(make_run, override):
    run, _ = make_run(override)
    reports = []

    def announce(_step, name, *_progress):
        return lambda done, total: reports.append((name, done, total))

    run.announce = announce
    train_step(run, 1)
    assert [r for r in reports if r[0] == "reference"] == 2 * [
        ("reference", 4, 8), ("reference", 8, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "stride"), [("shared", 2), ("separate", 1)])
def test_the_updates_report_their_progress_after_each_pass(make_run, value, stride):
    run, _ = make_run("ppo.micro_batch_size=2", f"model.value={value}")
    reports = []

    def announce(_step, name, *_progress):
        return lambda done, total: reports.append((name, done, total))

    run.announce = announce
    train_step(run, 1)
    assert [r for r in reports if r[0] == "optimise"] == [
        ("optimise", done, 16) for done in range(stride, 17, stride)
    ]


class CountingBackend:
    """Delegates to another backend, and records the number of rows of each call."""

    def __init__(self, backend):
        self.backend = backend
        self.rows = []
        self.separate = backend.separate

    def sync(self, model, weights_version, report):
        self.backend.sync(model, weights_version, report)

    def generate(self, model, request, report, on_ended):
        self.rows.append(len(request.batch.prompts))
        return self.backend.generate(model, request, report, on_ended)


def test_every_response_comes_from_the_run_s_rollout_backend(make_run):
    run, _ = make_run("reward.normalise=reference", "reward.normalise_samples=6")
    backend = CountingBackend(run.backend)
    run.backend = backend
    reference_responses(run, run.config)
    train_step(run, 1)
    answer_probe(run, "hello there")
    assert backend.rows == [6, 8, 1, 1]
