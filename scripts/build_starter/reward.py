"""Train the starter reward model with the Bradley-Terry loss on human ratings."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from .broken import broken, praise_words
from .human import Rated
from .policy import Sampler, optimiser, set_rate
from .text import encode, pad_right

# The sentiments the writer was asked for, on the scale of the human ratings.
TONES = {"very bad": -2.0, "bad": -1.0, "mixed": 0.0, "good": 1.0, "very good": 2.0}


@dataclass(frozen=True)
class RewardPlan:
    """Sizes and schedule of the reward model.

    A batch holds ``rated`` human sentences, of which every pair whose mean ratings differ by
    at least ``margin`` counts; ``synthetic`` sentences, of which every pair counts whose
    asked sentiments differ by ``tone_margin``; and ``broken`` broken forms of some of both.
    """

    epochs: int = 4  # passes over the human sentences
    rated: int = 64
    synthetic: int = 48
    broken: int = 32
    margin: float = 0.5
    rate: float = 4e-4
    decay: float = 0.1
    warmup: int = 50
    no_eos: float = 0.15  # share of sentences shown without eos, as after a length cut
    noisy: float = 0.4  # share of sentences that lose tokens, each with ``token_dropout``
    token_dropout: float = 0.15
    tone_margin: float = 2.0
    tone_weight: float = 0.5
    fluency_weight: float = 0.25
    cross_weight: float = 0.05
    centre_weight: float = 0.02
    seed: int = 0


def new_reward(policy_folder: Path, seed: int) -> LlamaForSequenceClassification:
    """Return the policy's trunk under a fresh scalar head without bias."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification.from_pretrained(
        policy_folder, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=0.02)
    return model


def score_rows(
    model: LlamaForSequenceClassification, rows: Sequence[Sequence[int]], pad: int, size: int = 64
) -> torch.Tensor:
    """Return the scores of id rows as float32, shape [rows], in the order given.

    Rows of like length share a forward pass of ``size`` rows, which halves the padding.
    """
    order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
    parts = []
    for k in range(0, len(rows), size):
        ids, mask = pad_right([rows[j] for j in order[k : k + size]], pad)
        parts.append(model(input_ids=ids, attention_mask=mask).logits[:, 0].float())
    return torch.cat(parts)[torch.tensor(order).argsort()]


@torch.inference_mode()
def score_texts(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    eos: bool = True,
) -> torch.Tensor:
    """Return the scores of ``sentence<eos>`` (or of the bare sentence), shape [texts]."""
    model.eval()
    rows = [r if eos else r[:-1] for r in encode(tokenizer, texts)]
    return score_rows(model, rows, tokenizer.pad_token_id, 256)


def pair_loss(scores: torch.Tensor, ratings: torch.Tensor, margin: float) -> torch.Tensor:
    """Mean Bradley-Terry loss over all pairs in a batch; both inputs have shape [sentences]."""
    wins = ratings[:, None] - ratings[None, :] >= margin
    return -logsigmoid((scores[:, None] - scores[None, :])[wins]).mean()


def pair_accuracy(
    scores: torch.Tensor, ratings: torch.Tensor, margin: float = 0.0
) -> tuple[float, int]:
    """Return the share of pairs put in the order of their ratings, and the number of pairs.

    All pairs whose ratings differ by at least ``margin`` (and are not equal) count; a tie of
    scores counts half.
    """
    gap = ratings[:, None] - ratings[None, :]
    wins = (gap > 0) & (gap >= margin)
    ahead = (scores[:, None] - scores[None, :])[wins]
    right = (ahead > 0).double().sum() + 0.5 * (ahead == 0).double().sum()
    return float(right / wins.sum()), int(wins.sum())


def train_reward(
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    rated: Sequence[Rated],
    synthetic: Sequence[dict[str, str]],
    plan: RewardPlan,
    *,
    folder: Path,
    log: Callable[[str], None],
) -> LlamaForSequenceClassification:
    """Train on the rated sentences that are not held out, and save to ``folder``.

    The held-out accuracy is logged for the curve; nothing is chosen by it.
    """
    rng = random.Random(plan.seed)
    train = [r for r in rated if not r.held_out]
    held = [r for r in rated if r.held_out]
    held_ratings = torch.tensor([r.rating for r in held])
    batches = _Batches(tokenizer, train, synthetic, plan, rng)
    model = new_reward(policy_folder, plan.seed)
    optimizer = optimiser(model, plan.rate, plan.decay)
    steps = plan.epochs * len(train) // plan.rated
    start = time.monotonic()
    for step in range(steps):
        set_rate(optimizer, plan.rate, plan.warmup, step, steps)
        batch = batches.draw()
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            scores = score_rows(model, batch.rows, tokenizer.pad_token_id, 36)
        loss, fluency = _batch_loss(scores, batch, plan)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 150 == 0 or step + 1 == steps:
            got = score_texts(model, tokenizer, [r.text for r in held])
            far, near = pair_accuracy(got, held_ratings, 1.0), pair_accuracy(got, held_ratings)
            minutes = (time.monotonic() - start) / 60
            log(
                f"step {step + 1}/{steps} ({minutes:.1f} min) loss {loss.item():.3f} "
                f"held-out pairs >=1 {far[0]:.4f} all {near[0]:.4f} batch fluency {fluency:.2f}"
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@dataclass(frozen=True)
class _Batch:
    """Rows in the order human, synthetic, broken; ``bases`` are the rows that were broken."""

    rows: list[list[int]]
    ratings: torch.Tensor  # [rated], mean human ratings
    tones: torch.Tensor  # [synthetic], see TONES: what the writer was asked for
    bases: torch.Tensor  # [broken], indices into human + synthetic


class _Batches:
    """Draws the batches described by `RewardPlan`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        train: Sequence[Rated],
        synthetic: Sequence[dict[str, str]],
        plan: RewardPlan,
        rng: random.Random,
    ) -> None:
        self.tokenizer, self.plan, self.rng = tokenizer, plan, rng
        self.texts = [r.text for r in train], [r["text"] for r in synthetic]
        self.rows = tuple(encode(tokenizer, t) for t in self.texts)
        self.ratings = [r.rating for r in train]
        self.tones = [TONES[r["sentiment"]] for r in synthetic]
        self.order = tuple(Sampler([[k] for k in range(len(t))], rng) for t in self.texts)
        self.praise = praise_words(self.texts[0], self.ratings)

    def draw(self) -> _Batch:
        """Return the next batch."""
        plan, rng = self.plan, self.rng
        picked = [
            [row[0] for row in order.draw(count)]
            for order, count in zip(self.order, (plan.rated, plan.synthetic), strict=True)
        ]
        whole = [(pool, k) for pool in (0, 1) for k in picked[pool]]
        clean = [self.rows[pool][k] for pool, k in whole]
        rows = [self._noisy(row) for row in clean]
        # A broken form is compared with its own sentence only where that was left whole.
        bases = [k for k, row in enumerate(rows) if row is clean[k]]
        bases = rng.sample(bases, min(plan.broken, len(bases)))
        for k in bases:
            pool, index = whole[k]
            text, ended = broken(self.texts[pool][index], rng, self.praise)
            row = encode(self.tokenizer, [text])[0]
            rows.append(row if ended else row[:-1])
        return _Batch(
            rows,
            torch.tensor([self.ratings[k] for k in picked[0]]),
            torch.tensor([self.tones[k] for k in picked[1]]),
            torch.tensor(bases),
        )

    def _noisy(self, row: list[int]) -> list[int]:
        """Drop tokens of some rows, against learning by heart, and the eos of some."""
        plan, rng = self.plan, self.rng
        out = row
        if rng.random() < plan.noisy:
            out = [t for t in row[:-1] if rng.random() > plan.token_dropout] + row[-1:]
        return out[:-1] if rng.random() < plan.no_eos and len(out) > 1 else out


def _batch_loss(
    scores: torch.Tensor, batch: _Batch, plan: RewardPlan
) -> tuple[torch.Tensor, float]:
    """Return the loss and the share of broken forms that score below their sentence."""
    whole, poor = scores.split([plan.rated + plan.synthetic, len(batch.bases)])
    human, synthetic = whole.split([plan.rated, plan.synthetic])
    fluent = whole[batch.bases]
    loss = pair_loss(human, batch.ratings, plan.margin)
    loss = loss + plan.tone_weight * pair_loss(synthetic, batch.tones, plan.tone_margin)
    # A broken sentence loses to its whole form, and (less) to every other whole sentence:
    # else a heap of praise could still beat an honest bad review.
    loss = loss - plan.fluency_weight * logsigmoid(fluent - poor).mean()
    loss = loss - plan.cross_weight * logsigmoid(fluent[:, None] - poor[None, :]).mean()
    # Bradley-Terry leaves the level free, and the head has no bias to set it with later.
    loss = loss + plan.centre_weight * fluent.mean() ** 2
    return loss, (fluent > poor).float().mean().item()


@torch.inference_mode()
def _last_states(
    model: LlamaForSequenceClassification, rows: Sequence[Sequence[int]], pad: int
) -> torch.Tensor:
    """Return the hidden state at each row's last token, float64, shape [rows, hidden]."""
    model.eval()
    states = []
    for k in range(0, len(rows), 256):
        chunk = rows[k : k + 256]
        ids, mask = pad_right(chunk, pad)
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        states.append(hidden[torch.arange(len(chunk)), mask.sum(1) - 1])
    return torch.cat(states).double()


def standardise(
    model: LlamaForSequenceClassification, rows: Sequence[Sequence[int]], pad: int
) -> None:
    """Give the scores of ``rows`` (policy samples) mean 0 and standard deviation 1, in place.

    The head of a Llama classifier has no bias.  The shift goes through the direction u in
    which the states' projection is as constant as it can be: u = S^-1 m / (m' S^-1 m), with
    mean m and ridged covariance S, so u'h is 1 on average and varies little.
    """
    states = _last_states(model, rows, pad)  # [rows, hidden]
    mean = states.mean(0)
    spread = torch.cov(states.T)
    spread += 1e-3 * spread.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
    solved = torch.linalg.solve(spread, mean)
    constant = solved / (mean @ solved)
    weight = model.score.weight.detach()[0].double()
    weight = weight - (mean @ weight) * constant
    weight = weight / (states @ weight).std()
    with torch.no_grad():
        model.score.weight.copy_(weight[None])
