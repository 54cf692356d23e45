"""Train the starter policy: a small Llama that finishes a one-sentence review."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .text import MAX_POSITIONS, by_length, encode, pad_right


@dataclass(frozen=True)
class PolicyPlan:
    """Sizes and schedule.

    ``human_start`` is the share of human sentences in a batch at the first step; it falls
    linearly to ``human_end`` at ``human_until`` of the run and stays there.  The human text is
    wordier and fuller of names than a model this small can follow, so it teaches words early
    and makes room for the plainer synthetic text.
    """

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    intermediate: int = 640
    steps: int = 1200
    batch: int = 128  # sentences
    chunk: int = 32  # sentences of like length in one forward pass: less padding
    rate: float = 2e-3
    warmup: int = 80
    decay: float = 0.1
    human_start: float = 0.5
    human_end: float = 0.08
    human_until: float = 0.6
    seed: int = 0


def new_policy(tokenizer: PreTrainedTokenizerFast, plan: PolicyPlan) -> LlamaForCausalLM:
    """Return an untrained policy with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden,
        intermediate_size=plan.intermediate,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(plan.seed)
    return LlamaForCausalLM(config)


def optimiser(model: torch.nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def set_rate(
    optimizer: torch.optim.Optimizer, rate: float, warmup: int, step: int, steps: int
) -> None:
    """Set the learning rate of a step: a linear warm-up, and a cosine down to 2 % of ``rate``."""
    scale = min(1.0, (step + 1) / warmup)
    scale *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate * scale


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the summed next-token loss in nats and the token count, shape [2].

    Every token after the first is predicted, the eos included.
    """
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return torch.stack([total, (targets != -100).sum().to(total.dtype)])


def sharpen(model: LlamaForCausalLM, temperature: float) -> None:
    """Fold a sampling temperature into the weights, in place.

    The logits are linear in the last norm's weight, so after this, sampling at temperature
    1.0 is what sampling at ``temperature`` was before.
    """
    with torch.no_grad():
        model.model.norm.weight /= temperature


@torch.inference_mode()
def mean_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> float:
    """Return the mean loss in nats per token over ``sentence<eos>``."""
    model.eval()
    rows = sorted(encode(tokenizer, texts), key=len)
    sums = torch.zeros(2)
    for k in range(0, len(rows), 256):
        sums += token_losses(model, *pad_right(rows[k : k + 256], tokenizer.pad_token_id))
    return float(sums[0] / sums[1])


class Sampler:
    """Draws length-bucketed batches from a pool, without replacement until it is used up."""

    def __init__(self, rows: Sequence[list[int]], rng: random.Random) -> None:
        self.rows, self.rng = rows, rng
        self.left: list[int] = []

    def draw(self, count: int) -> list[list[int]]:
        """Return ``count`` rows of ids."""
        while len(self.left) < count:
            fresh = list(range(len(self.rows)))
            self.rng.shuffle(fresh)
            self.left = fresh + self.left
        taken, self.left = self.left[-count:], self.left[:-count]
        return [self.rows[k] for k in taken]


def _update(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    chunks: Sequence[Sequence[list[int]]],
    pad: int,
) -> torch.Tensor:
    """Take one step on the mean loss per token; return loss and tokens as `token_losses` does."""
    tokens = sum(len(row) - 1 for rows in chunks for row in rows)
    total = torch.zeros(2)
    optimizer.zero_grad()
    model.train()
    for rows in chunks:
        with torch.autocast("cpu", torch.bfloat16):
            sums = token_losses(model, *pad_right(rows, pad))
        (sums[0] / tokens).backward()
        total += sums.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def train_policy(
    tokenizer: PreTrainedTokenizerFast,
    human: Sequence[str],
    synthetic: Sequence[str],
    plan: PolicyPlan,
    *,
    held_out: dict[str, Sequence[str]],
    folder: Path,
    log: Callable[[str], None],
) -> LlamaForCausalLM:
    """Train on ``sentence<eos>`` and save to ``folder``; ``held_out`` is only reported."""
    rng = random.Random(plan.seed)
    model = new_policy(tokenizer, plan)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = optimiser(model, plan.rate, plan.decay)
    pools = Sampler(encode(tokenizer, human), rng), Sampler(encode(tokenizer, synthetic), rng)
    start = time.monotonic()
    running = torch.zeros(2)
    for step in range(plan.steps):
        done = step / plan.steps
        set_rate(optimizer, plan.rate, plan.warmup, step, plan.steps)
        fade = min(1.0, done / plan.human_until)
        share = plan.human_start + (plan.human_end - plan.human_start) * fade
        from_human = round(share * plan.batch)
        rows = pools[0].draw(from_human) + pools[1].draw(plan.batch - from_human)
        running += _update(model, optimizer, by_length(rows, plan.chunk), tokenizer.pad_token_id)
        if (step + 1) % 100 == 0:
            figures = {k: round(mean_loss(model, tokenizer, v), 3) for k, v in held_out.items()}
            minutes = (time.monotonic() - start) / 60
            train = float(running[0] / running[1])
            log(f"step {step + 1} ({done:.0%}, {minutes:.1f} min) train {train:.3f} {figures}")
            running = torch.zeros(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
