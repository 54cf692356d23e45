"""Train a reward model: ``python -m scripts.smollm2.reward FOLDER``, after scripts.smollm2.unpack.

It is a head on the encoder in ``FOLDER/encoder``, and is written to ``FOLDER/reward``. It learns
from the sentences that the starter's reward model learned from, each rated by twenty people
(:mod:`scripts.build_starter.human`). The encoder is frozen, so what it makes of a sentence is
computed once; what is trained are the two layers above it, BERT's pooler and classifier.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.errors import UserInputError
from engine.train.models.read_pretrained import read_pretrained
from scripts.build_starter.human import fetch, read_rated
from scripts.build_starter.reward import pair_accuracy, pair_loss

ENCODED_AT_ONCE = 128
"""Sentences of a forward pass of the encoder."""


@dataclass(frozen=True)
class HeadPlan:
    """Sizes and schedule of the training of the head.

    Of the sentences of a batch, every pair counts whose mean ratings differ by ``margin`` or more.
    """

    epochs: int = 20
    batch: int = 256
    margin: float = 0.5
    rate: float = 1e-3
    decay: float = 0.05
    dropout: float = 0.2
    seed: int = 0


@torch.no_grad()
def first_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The encoder's last state of each text's first token, which the pooler reads.

    Args:
        model: BERT with a head.
        tokenizer: its tokenizer.
        texts: n of them.

    Returns:
        (n, width) float32.
    """
    model.eval()
    states = torch.zeros(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that padding is short
    for first in range(0, len(order), ENCODED_AT_ONCE):
        rows = order[first : first + ENCODED_AT_ONCE]
        inputs = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt"
        )
        states[rows] = model.bert(**inputs).last_hidden_state[:, 0].float()
    return states


def fit_head(model: Any, states: Tensor, ratings: Tensor, plan: HeadPlan) -> nn.Module:
    """Trains pooler and classifier, then scales them so that the given states score 0 ± 1.

    Args:
        model: BERT with a head of one logit, which is changed.
        states: (n, width) float32, of :func:`first_states`.
        ratings: (n,) float32, mean ratings.
        plan: how.

    Returns:
        The head, without dropout: (n, width) → (n, 1). It is made of the model's own layers.
    """
    torch.manual_seed(plan.seed)
    dropout = nn.Dropout(plan.dropout)
    head = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), dropout, model.classifier).train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=plan.rate, weight_decay=plan.decay)
    updates = plan.epochs * -(-len(states) // plan.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for _ in range(plan.epochs):
        for rows in torch.randperm(len(states)).split(plan.batch):
            loss = pair_loss(head(states[rows])[:, 0], ratings[rows], plan.margin)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    head.eval()
    with torch.no_grad():
        scores = head(states)[:, 0]
        model.classifier.bias.sub_(scores.mean()).div_(scores.std())
        model.classifier.weight.div_(scores.std())
    return head


def train(folder: Path, packages: Path, plan: HeadPlan) -> None:
    """Reads the ratings and the encoder, trains the head and writes the reward model.

    Raises:
        UserInputError: the encoder cannot be read.
    """
    source, _ = fetch(packages)
    rated = read_rated(source)
    path = str(folder / "encoder")
    tokenizer = read_pretrained(AutoTokenizer, path, "encoder", "tokenizer")
    torch.manual_seed(plan.seed)  # transformers draws the classifier
    model = read_pretrained(
        AutoModelForSequenceClassification, path, "encoder",
        dtype=torch.float32, num_labels=1, new_head=True,
    )  # fmt: skip
    states = first_states(model, tokenizer, [r.text for r in rated])
    ratings = torch.tensor([r.rating for r in rated])
    held_out = torch.tensor([r.held_out for r in rated])
    print(f"{len(rated)} rated sentences, {int(held_out.sum())} of them held out")
    head = fit_head(model, states[~held_out], ratings[~held_out], plan)
    with torch.no_grad():
        scores = head(states)[:, 0]
    for name, part in (("training", ~held_out), ("held-out", held_out)):
        far, near = (pair_accuracy(scores[part], ratings[part], margin)[0] for margin in (1, 0))
        print(f"{name} pairs in the right order: {near:.1%}; a point or more apart {far:.1%}")
    model.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


def main() -> None:
    """Parses the command line and trains."""
    parser = argparse.ArgumentParser(prog="python -m scripts.smollm2.reward", description=__doc__)
    parser.add_argument("folder", type=Path, help="with the encoder; the reward model goes there")
    parser.add_argument(
        "--packages", type=Path, help="downloaded packages; default: FOLDER/packages"
    )
    parser.add_argument("--epochs", type=int, default=HeadPlan.epochs)
    parser.add_argument("--rate", type=float, default=HeadPlan.rate)
    given = parser.parse_args()
    plan = HeadPlan(epochs=given.epochs, rate=given.rate)
    try:
        train(given.folder, given.packages or given.folder / "packages", plan)
    except UserInputError as error:
        sys.exit(str(error))
    print(f"{given.folder / 'reward'} is written")


if __name__ == "__main__":
    main()
