"""Losses and estimators compared with TRL's own functions on the same numbers.

TRL is not a dependency: `make bench-extra` installs TRL 1.12, and without it these tests are
skipped; later versions will do as well. `test_step_against_trl.py` compares with its PPO trainer.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import starter
from engine.config.sections.ppo import PPOConfig
from engine.train.ppo import advantages, losses, masked
from engine.train.ppo.kl_estimators import k3
from engine.train.ppo.logprobs import token_logprobs, token_logprobs_and_entropies
from engine.train.rewards.normalise import group_scales

REASON = "TRL is not installed (make bench-extra)"
pytest.importorskip("trl", minversion="1.12", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)
pytest.importorskip("requests", reason="TRL's GRPO trainer imports requests without requiring it")

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402 - see above
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402
from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # noqa: E402

GROUP, LIMIT = 4, 6
LENGTHS = torch.tensor([6, 2, 5, 1])
AGGREGATION = {
    "grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "sequence_sum_constant",
    "cispo": "token", "sapo": "sequence", "luspo": "sequence_sum",
    "vespo": "token", "gmpo": "sequence",
}  # fmt: skip
"""TRL's `loss_type` → `ppo.loss_aggregation`."""


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropies_are_trl_s(temperature):
    logits, tokens = 4 * numbers(3, 5, 50), torch.randint(50, (3, 5))
    scaled = logits / temperature
    want = selective_log_softmax(scaled, tokens), entropy_from_logits(scaled)
    torch.testing.assert_close(token_logprobs(logits.clone(), tokens, temperature), want[0])
    both = token_logprobs_and_entropies(logits.clone(), tokens, temperature)
    torch.testing.assert_close(both, want)


def load(kind):
    return kind.from_pretrained(starter.resolve("starter:policy"))


def trainer_of(trainer, config, folder, reward, **options):
    """A trainer of TRL for the starter policy, with a batch of two groups."""
    return trainer(
        model=load(AutoModelForCausalLM).float(),
        reward_funcs=reward,
        processing_class=load(AutoTokenizer),
        train_dataset=datasets.Dataset.from_list([{"prompt": "The film"}, {"prompt": "The food"}]),
        args=config(
            output_dir=str(folder), per_device_train_batch_size=2 * GROUP, num_generations=GROUP,
            max_completion_length=LIMIT, max_steps=1, learning_rate=0.0, use_cpu=True, bf16=False,
            report_to=[], save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            **options,
        ),
    )  # fmt: skip


def trained_advantages(trainer, config, folder, **options):
    """The rewards and the advantages of one training step, each (2·GROUP,) and sorted."""
    given, found = [], []

    class Recording(trainer):
        def compute_loss(self, model, inputs, **named):
            found.extend(inputs["advantages"].tolist())
            return super().compute_loss(model, inputs, **named)

    def reward(completions, **_):
        given.extend(numbers(len(completions), seed=3).tolist())
        return given

    trainer_of(Recording, config, folder, reward, beta=0.0, **options).train()
    return torch.tensor(given), torch.tensor(sorted(found))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_those_of_trl_s_grpo(tmp_path, scale):
    scores, want = trained_advantages(GRPOTrainer, GRPOConfig, tmp_path, scale_rewards=scale)
    ours = advantages.group_advantages(scores, GROUP, scale)
    torch.testing.assert_close(ours.sort().values, want, rtol=1e-5, atol=1e-5)


def test_sources_normalised_in_groups_give_the_advantages_of_trl_s_gdpo(tmp_path):
    found, given = [], {"a": [], "b": []}

    class Recording(GRPOTrainer):
        def compute_loss(self, model, inputs, **named):
            found.extend(inputs["advantages"].tolist())
            return super().compute_loss(model, inputs, **named)

    def a(completions, **_):
        given["a"].extend(numbers(len(completions), seed=3).tolist())
        return given["a"]

    def b(completions, **_):
        some = (10 * numbers(len(completions), seed=4) > 3).tolist()
        given["b"].extend(None if i == 2 else float(x) for i, x in enumerate(some))
        return given["b"]

    trainer_of(
        Recording, GRPOConfig, tmp_path, [a, b], beta=0.0, reward_weights=[1.0, 0.5],
        multi_objective_aggregation="normalize_then_sum",
    ).train()  # fmt: skip
    total = torch.zeros(len(given["a"]))
    for name, weight in (("a", 1.0), ("b", 0.5)):
        for i, (mean, deviation) in enumerate(group_scales(given[name], GROUP)):
            if given[name][i] is not None:
                total[i] += weight * (given[name][i] - mean) / deviation
    ours = advantages.group_advantages(total, GROUP, "batch")
    torch.testing.assert_close(
        ours.sort().values, torch.tensor(sorted(found)), rtol=1e-5, atol=1e-5
    )


def test_leave_one_out_advantages_are_those_of_trl_s_rloo(tmp_path):
    scores, want = trained_advantages(RLOOTrainer, RLOOConfig, tmp_path)
    ours = advantages.leave_one_out(scores, GROUP)
    torch.testing.assert_close(ours.sort().values, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's trainers of two kinds of losses."""
    made = {}
    for trainer, config in ((GRPOTrainer, GRPOConfig), (GMPOTrainer, GMPOConfig)):
        folder = tmp_path_factory.mktemp(trainer.__name__)
        made[trainer] = trainer_of(trainer, config, folder, lambda completions, **_: completions)
        made[trainer].model.eval()  # their loss is then divided by no number of batches
    return made


def ours(trainer, inputs, case):
    """The loss by the engine's functions."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    width, mask = inputs["completion_ids"].shape[1], inputs["completion_mask"].bool()
    logits = trainer.model(tokens).logits[:, -width - 1 : -1]
    logprobs, entropies = token_logprobs_and_entropies(logits, inputs["completion_ids"], 1.0)
    size = losses.MinibatchSize(int(mask.sum()), len(mask), LIMIT)
    weights = losses.AGGREGATIONS[AGGREGATION[case["loss_type"]]](size, LENGTHS)
    kind = case["loss_type"]
    advantages = inputs["advantages"][:, None].expand(mask.shape)
    if case["limit"] is not None:
        sampled = inputs["sampling_per_token_logps"]
        out = losses.off_policy(logprobs, sampled, advantages, mask, case["limit"])
        assert out.any() and not out.all()
        advantages = advantages.masked_fill(out, 0.0)
    config = PPOConfig(
        policy_loss=kind if kind in losses.POLICY_LOSSES else "clipped",
        clip_range=1.0 if kind == "cispo" else 0.2,  # theirs has no lower bound
        clip_range_high=case["high"], dual_clip=case["delta"], ratio=case["ratio"],
    )  # fmt: skip
    old = inputs["old_per_token_logps"]
    loss = losses.policy_terms(logprobs, old, advantages, mask, config, weights).loss
    if case["beta"]:
        kl = k3((logprobs - inputs["ref_per_token_logps"]) * mask)
        if case["weighted"]:
            kl = kl * losses.log_ratio(logprobs, old, mask, case["ratio"]).exp()
        loss = loss + case["beta"] * losses.weighted_sum(kl, mask, weights)
    if case["entropy"]:
        loss = loss - case["entropy"] * losses.weighted_sum(entropies, mask, weights)
    return loss / size.tokens


KEYS = ("loss_type", "ratio", "high", "delta", "beta", "entropy", "weighted", "limit")
CASES = [
    dict(zip(KEYS, (*case, None)[: len(KEYS)], strict=True))
    for case in [
        ("grpo", "token", None, None, 0.0, 0.0, False),
        ("grpo", "token", 0.28, 1.5, 0.1, 0.0, False),
        ("grpo", "sequence_mean", 0.28, None, 0.1, 0.0, False),
        # Their entropy is always the mean over tokens.
        ("bnpo", "token", None, 1.5, 0.1, 0.3, False),
        ("dapo", "token", 0.28, None, 0.0, 0.0, False),
        ("dr_grpo", "token", None, None, 0.1, 0.0, False),
        ("dr_grpo", "token", 0.28, 1.5, 0.0, 0.0, False),
        ("cispo", "token", 0.3, None, 0.1, 0.0, False),
        ("sapo", "token", None, None, 0.1, 0.0, False),
        ("sapo", "sequence_mean", None, None, 0.0, 0.0, False),
        ("grpo", "token", None, None, 0.1, 0.0, True),
        ("grpo", "sequence_mean", None, None, 0.1, 0.0, True),
        ("luspo", "sequence_mean", 0.28, None, 0.0, 0.0, False),
        ("grpo", "token", None, None, 0.1, 0.0, False, 0.1),
        ("vespo", "sequence", None, None, 0.1, 0.0, False),
        ("gmpo", "sequence_mean", None, None, 0.0, 0.0, False),
        ("gmpo", "sequence_mean", 0.35, None, 0.1, 0.0, False),
    ]
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_and_its_gradient_are_those_of_trl(trainers, case):
    grpo = trainers[GMPOTrainer if case["loss_type"] == "gmpo" else GRPOTrainer]
    mask = masked.response_mask(LENGTHS, LIMIT)
    prompt = torch.tensor([load(AutoTokenizer)("The film").input_ids] * len(LENGTHS))
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.randint(5, 4000, mask.shape),
        "completion_mask": mask.long(),
        "advantages": numbers(len(LENGTHS), seed=1) - 0.3,
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        tokens = torch.cat([prompt, inputs["completion_ids"]], 1)
        logits = grpo.model(tokens).logits[:, -LIMIT - 1 : -1]
        current = token_logprobs(logits, inputs["completion_ids"], 1.0)
    inputs["old_per_token_logps"] = current + 0.4 * numbers(*mask.shape, seed=2)
    inputs["ref_per_token_logps"] = current + 0.4 * numbers(*mask.shape, seed=3)
    inputs["sampling_per_token_logps"] = current + 0.4 * numbers(*mask.shape, seed=4)
    grpo.off_policy_mask_threshold = case["limit"]
    grpo.loss_type, grpo.beta = case["loss_type"], case["beta"]
    grpo.epsilon_low = 0.2
    grpo.epsilon_high = case["high"] or 0.2
    if case["loss_type"] == "cispo":  # theirs is the bound itself
        grpo.epsilon_high += 1
    grpo.importance_sampling_level = "token" if case["ratio"] == "token" else "sequence"
    grpo.args.use_bias_correction_kl = case["weighted"]
    grpo.args.delta, grpo.entropy_coef = case["delta"], case["entropy"]
    vars(grpo)["_entropy_bonus_enabled"] = bool(case["entropy"])
    found = []
    for compute in (grpo.compute_loss, lambda model, given: ours(grpo, given, case)):
        grpo.model.zero_grad()
        loss = compute(grpo.model, dict(inputs))
        loss.backward()
        found.append((loss.detach(), grpo.model.lm_head.weight.grad.clone()))
    (their_loss, their_gradient), (loss, gradient) = found
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-3, atol=1e-6)
    assert their_gradient.abs().max() > 1e-4
