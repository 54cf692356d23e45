"""A whole PPO step compared with TRL's trainer on the same rollout, prompts and minibatches.

TRL is not a dependency: `make bench-extra` installs TRL 1.12, the last version with this trainer,
and without it these tests are skipped. It computes GAE and the loss inside its training loop, where
no test can call them; `benchmarks/learning_vs_trl.py` compares what both learn. The engine gets
TRL's settings where its defaults differ; docs/from-trl.md lists them.
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from benchmarks.side import NO_TRL, has_ppo_trainer
from engine import starter
from engine.config import file as config_file
from engine.train.data.randomness import permutation
from engine.train.experience.generation import generate_rollout
from engine.train.ppo import masked
from engine.train.step import train_step

if not has_ppo_trainer():
    pytest.skip(NO_TRL, allow_module_level=True)
datasets = pytest.importorskip("datasets", reason=NO_TRL)

from trl.experimental import ppo  # noqa: E402 - see above
from trl.experimental.ppo import ppo_trainer  # noqa: E402

RESPONSES, EPOCHS, MINIBATCHES, RATE, BETA = 8, 2, 2, 1e-4, 0.05


@pytest.mark.parametrize("shift", [True, False])
def test_whitening_is_trl_s_but_for_the_denominator_of_the_variance(shift):
    values = 3 + 2 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    mask = masked.response_mask(torch.tensor([9, 3, 1, 7]), 9)
    count = int(mask.sum())
    theirs = ppo_trainer.masked_whiten(values, mask, shift)
    mean = 0.0 if shift else float(masked.masked_mean(values, mask))
    # Theirs divides by n − 1, ours by n as lm-human-preferences does.
    wanted = (theirs - mean) * (count / (count - 1)) ** 0.5 + mean
    torch.testing.assert_close(
        masked.whiten(values, mask, shift_mean=shift)[mask], wanted[mask], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        masked.masked_mean(values, mask), ppo_trainer.masked_mean(values, mask)
    )


def run_config(new_tokens):
    return config_file.load(
        starter.FOLDER / "demo.yaml",
        [
            f"rollout.batch_size={RESPONSES}", f"rollout.max_new_tokens={new_tokens}",
            f"ppo.epochs={EPOCHS}", f"ppo.minibatches={MINIBATCHES}", "kl.controller=fixed",
            f"kl.beta={BETA}", f"train.learning_rate={RATE}", "launch.threads=1",
            "model.value=separate", "ppo.value_init=reward_model", "ppo.value_clip=0.2",
            "train.adam_eps=1e-8", "ppo.max_grad_norm=1e6",
        ],
    )  # fmt: skip


def trained_by_trl(folder, monkeypatch, rollout, orders):
    """The policy and the value model after one iteration on a rollout."""
    tokenizer = AutoTokenizer.from_pretrained(
        starter.resolve("starter:policy"), padding_side="left"
    )

    def padded(ids, mask):
        return torch.where(mask, ids, tokenizer.pad_token_id)

    queries = rollout.batch.ids
    width = queries.shape[1]
    queries = padded(queries, torch.arange(width) >= width - rollout.batch.lengths[:, None])

    def recorded(model, queries, _size, pad, _config):
        tokens = torch.cat([queries, padded(rollout.ids, rollout.mask)], 1)
        return tokens, ppo_trainer.forward(model, tokens, pad).logits[:, width - 1 : -1]

    def load(kind, name, **more):
        return kind.from_pretrained(starter.resolve(name), dtype=torch.float32, **more)

    def classifier():
        return load(AutoModelForSequenceClassification, "starter:reward", num_labels=1)

    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(
            output_dir=str(folder), per_device_train_batch_size=RESPONSES,
            gradient_accumulation_steps=1, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
            response_length=rollout.ids.shape[1], stop_token_id=tokenizer.eos_token_id,
            temperature=1.0, kl_coef=BETA,
            learning_rate=RATE, lr_scheduler_type="constant", total_episodes=RESPONSES,
            num_sample_generations=0, gradient_checkpointing=False, bf16=False, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True,
        ),
        processing_class=tokenizer, train_dataset=datasets.Dataset.from_list([{"input_ids": [1]}]),
        model=load(AutoModelForCausalLM, "starter:policy"),
        ref_model=load(AutoModelForCausalLM, "starter:policy"),
        reward_model=classifier(), value_model=classifier(),
    )  # fmt: skip
    trainer.dataloader = [{"input_ids": queries}]
    permutations = iter(orders)
    monkeypatch.setattr(ppo_trainer, "batch_generation", recorded)
    monkeypatch.setattr(ppo_trainer.np.random, "permutation", lambda _: next(permutations))
    trainer.train()
    return trainer.policy_model, trainer.value_model


@pytest.mark.parametrize(
    ("new_tokens", "ended"), [(3, False), (32, True)], ids=["truncated", "ended"]
)
def test_a_step_moves_the_policy_as_trl_s_trainer_does(
    new_tokens, ended, make_run, tmp_path, monkeypatch
):
    run, _ = make_run(config=run_config(new_tokens))
    rollout = generate_rollout(run, 1)
    assert bool(rollout.ended.any()) == ended
    orders = [
        permutation(run.state.sampling_seed, "minibatches", (1, epoch), RESPONSES).numpy()
        for epoch in range(EPOCHS)
    ]
    policy, value = trained_by_trl(tmp_path, monkeypatch, rollout, orders)
    models = [run.policy.lm]
    expected = [policy]
    if not ended:
        # TRL's value function also learns the place after an end-of-sequence token.
        models.append(run.policy.value_trunk)
        expected.append(value.base_model)
    before = [weights(model) for model in models]
    train_step(run, 1, rollout)
    for model, theirs, start in zip(models, expected, before, strict=True):
        ours, wanted = weights(model) - start, weights(theirs) - start
        assert ours.abs().max() > 3 * RATE
        # AdamW divides by a gradient's size: one of rounding errors alone moves its weight too.
        assert (ours - wanted).norm() < 0.01 * wanted.norm()


def weights(model):
    return torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])
