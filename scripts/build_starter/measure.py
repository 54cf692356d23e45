"""Measure the finished models as they are stored: float16 weights, loaded as float32."""

from __future__ import annotations

import random
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .broken import broken, praise_words
from .human import Rated
from .policy import mean_loss
from .recipes import DOMAINS
from .reward import TONES, pair_accuracy, score_rows, score_texts
from .text import load_tokenizer
from .writer import Record

MAX_LENGTH = 32  # tokens, prompt and eos included


@torch.inference_mode()
def sample_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    seed: int,
    batch: int = 128,
) -> list[list[int]]:
    """Sample at temperature 1.0 from the full distribution, up to ``MAX_LENGTH`` tokens.

    Returns prompt and response ids without padding; the last id is eos if the answer ended.
    """
    torch.manual_seed(seed)
    generator: Any = model.eval()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: list[list[int]] = []
    for k in range(0, len(prompts), batch):
        enc = tokenizer(prompts[k : k + batch], return_tensors="pt", padding=True)
        longest = enc.input_ids.shape[1]
        out = generator.generate(
            input_ids=enc.input_ids,
            attention_mask=enc.attention_mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_LENGTH,
            eos_token_id=eos,
            pad_token_id=pad,
        )
        for ids, mask in zip(out.tolist(), enc.attention_mask.tolist(), strict=True):
            prompt = [t for t, m in zip(ids[:longest], mask, strict=True) if m]
            response = ids[longest:][: MAX_LENGTH - len(prompt)]
            if eos in response:
                response = response[: response.index(eos) + 1]
            rows.append(prompt + response)
    return rows


def _rounded(value: float | torch.Tensor) -> float:
    return round(float(value), 4)


def measure(
    folder: Path,
    rated: Sequence[Rated],
    synthetic: Sequence[Record],
    *,
    prompts: Sequence[str],
    trained_on: Collection[str] = (),
    samples: int = 2048,
    seed: int = 1,
) -> dict[str, Any]:
    """Return the card's figures for ``folder``/policy and ``folder``/reward.

    ``trained_on`` are the training sentences, to count the samples that repeat one.
    ``synthetic`` are held-out records with ``text``, ``sentiment`` and ``domain``.
    """
    tokenizer = load_tokenizer(folder / "policy")
    policy: Any = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reward: Any = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", dtype=torch.float32
    )
    rng = random.Random(seed)
    drawn = [rng.choice(prompts) for _ in range(samples)]
    rows = sample_rows(policy, tokenizer, drawn, seed)
    held_out = [r for r in rated if r.held_out]
    return {
        "policy_parameters": sum(p.numel() for p in policy.parameters()),
        "reward_parameters": sum(p.numel() for p in reward.parameters()),
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "loss_nats_per_token": {
            "synthetic_held_out": _rounded(
                mean_loss(policy, tokenizer, [r["text"] for r in synthetic])
            ),
            "human_held_out": _rounded(mean_loss(policy, tokenizer, [r.text for r in held_out])),
        },
        **_sample_figures(reward, tokenizer, rows, trained_on),
        "reward_accuracy": _accuracy_figures(reward, tokenizer, held_out),
        "fluent_beats_its_broken_form": _fluency(reward, tokenizer, rated, synthetic, rng),
        **_sentiment_figures(reward, tokenizer, synthetic),
    }


def _sample_figures(
    reward: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[list[int]],
    trained_on: Collection[str],
) -> dict[str, Any]:
    """Return the figures of the policy's samples: their ends, lengths, scores and some texts."""
    with torch.inference_mode():
        scores = score_rows(reward, rows, tokenizer.pad_token_id, 256)
    ended = [r[-1] == tokenizer.eos_token_id for r in rows]
    lengths = [len(r) for r in rows]
    texts = tokenizer.batch_decode(list(rows), skip_special_tokens=True)
    quantiles = torch.quantile(scores, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    return {
        "samples": len(rows),
        "ended_with_eos": _rounded(sum(ended) / len(ended)),
        "samples_verbatim_from_training": _rounded(
            sum(t in trained_on for t in texts) / len(texts)
        ),
        "distinct_samples": _rounded(len(set(texts)) / len(texts)),
        "length_tokens": {
            "mean": _rounded(statistics.mean(lengths)),
            "median": statistics.median(lengths),
            "p95": sorted(lengths)[int(0.95 * len(lengths))],
        },
        "score_on_samples": {
            "mean": _rounded(scores.mean()),
            "std": _rounded(scores.std()),
            "quantiles_5_25_50_75_95": [_rounded(q) for q in quantiles],
        },
        "random_samples": [[t, _rounded(s)] for t, s in zip(texts[:15], scores[:15], strict=True)],
        "best_samples": [[texts[k], _rounded(scores[k])] for k in scores.topk(8).indices],
        "worst_samples": [[texts[k], _rounded(scores[k])] for k in (-scores).topk(8).indices],
    }


def _accuracy_figures(
    reward: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Sequence[Rated],
) -> dict[str, Any]:
    """Return the shares of pairs of held-out sentences that are put in the order of ratings."""
    texts = [r.text for r in held_out]
    ratings = torch.tensor([r.rating for r in held_out])
    scores = score_texts(reward, tokenizer, texts)
    without_eos = score_texts(reward, tokenizer, texts, eos=False)
    far, pairs_far = pair_accuracy(scores, ratings, 1.0)
    near, pairs_near = pair_accuracy(scores, ratings)
    by_domain = {}
    for domain in DOMAINS:
        of = torch.tensor([r.domain == domain for r in held_out])
        by_domain[domain] = _rounded(pair_accuracy(scores[of], ratings[of], 1.0)[0])
    return {
        "held_out_sentences": len(held_out),
        "pairs_gap_1": pairs_far,
        "gap_1": _rounded(far),
        "pairs_all": pairs_near,
        "all": _rounded(near),
        "gap_1_by_domain": by_domain,
        "gap_1_without_eos": _rounded(pair_accuracy(without_eos, ratings, 1.0)[0]),
    }


def _fluency(
    reward: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    rated: Sequence[Rated],
    synthetic: Sequence[Record],
    rng: random.Random,
) -> float:
    """Return the share of held-out sentences that score above a broken form of themselves."""
    train = [r for r in rated if not r.held_out]
    praise = praise_words([r.text for r in train], [r.rating for r in train])
    whole = [r.text for r in rated if r.held_out] + [r["text"] for r in synthetic]
    bad = [broken(t, rng, praise) for t in whole]
    with_eos = score_texts(reward, tokenizer, [t for t, _ in bad])
    without = score_texts(reward, tokenizer, [t for t, _ in bad], eos=False)
    bad_scores = torch.where(torch.tensor([ends for _, ends in bad]), with_eos, without)
    return _rounded((score_texts(reward, tokenizer, whole) > bad_scores).double().mean())


def _sentiment_figures(
    reward: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    synthetic: Sequence[Record],
) -> dict[str, Any]:
    """Return how held-out synthetic sentences score by the sentiment that was asked for."""
    scores = score_texts(reward, tokenizer, [r["text"] for r in synthetic])
    asked = torch.tensor([TONES[r["sentiment"]] for r in synthetic])
    return {
        "synthetic_very_good_beats_very_bad": _rounded(
            pair_accuracy(scores, asked, TONES["very good"] - TONES["very bad"])[0]
        ),
        "mean_score_by_asked_sentiment": {
            tone: _rounded(scores[asked == value].mean()) for tone, value in TONES.items()
        },
    }
