"""The training loop of a reward model.

A preference has the Bradley-Terry loss −log σ(s_chosen − s_rejected) (Christiano et al. 2017,
arXiv 1706.03741). A label has the logistic loss of the score against a learned threshold c:
−log σ(s − c) for `good`, −log σ(c − s) for any other. Both leave the level of the scores open, or
nearly so: a small penalty keeps the mean of a batch where the model had it (as `center_rewards` of
TRL keeps it at 0; Eisenstein et al. 2023, arXiv 2312.09244).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from engine.config.sections.reward_training import RewardTrainingConfig
from engine.errors import RlhfError
from engine.train.data.randomness import permutation
from engine.train.reward_training.base import BaseModel
from engine.train.reward_training.split import Judgement, Split
from engine.train.rewards.kinds.encoding import EncodedResponses

EVALUATED_AT_ONCE = 32
"""Rows of a forward pass without gradients."""
THRESHOLD_RATE = 0.02
"""Learning rate of the threshold of labels, in units of the score."""
WARMUP, FINAL = 0.05, 0.1
"""Share of the updates with a rising learning rate, and the share of the rate left at the end after
a linear decay."""
MAX_NORM = 1.0
NEWTON_STEPS = 50


@dataclass(frozen=True)
class Fitted:
    """The result of training; the model has the weights of the best epoch."""

    losses: list[tuple[float, float]]
    """Training and validation, after each epoch."""
    best_epoch: int


class RewardTrainer:
    """Trains one classifier on judgements."""

    def __init__(
        self, base: BaseModel, encoded: EncodedResponses, settings: RewardTrainingConfig
    ) -> None:
        """Prepares to train a model in place.

        Args:
            base: the model.
            encoded: all responses of the request.
            settings: with every learning setting.
        """
        self._model = base.model
        self._label = base.label
        self._new_head = base.new_head
        self._encoded = encoded
        self._settings = settings
        self._rate = base.learning_rate(settings.learning_rate)
        self._device = next(base.model.parameters()).device
        self._level = 0.0
        self._threshold = nn.Parameter(torch.zeros((), device=self._device))

    # -- scores --------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Computes all responses' scores without dropout, (B,) float32 on the host."""
        self._model.eval()
        scores = torch.zeros(len(self._encoded))
        order = self._encoded.by_length()
        for first in range(0, len(order), EVALUATED_AT_ONCE):
            rows = order[first : first + EVALUATED_AT_ONCE]
            scores[rows] = self._forward(rows).cpu()
        return scores

    def _forward(self, rows: Sequence[int]) -> Tensor:
        """Scores of some rows, (n,) float32."""
        self._model.config.pad_token_id = self._encoded.pad_of(rows)
        on_gpu = self._device.type == "cuda"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=on_gpu):
            logits = self._model(**self._encoded.batch(rows, self._device)).logits
        scores: Tensor = logits[:, self._label].float()
        return scores

    # -- training ------------------------------------------------------------------------------

    def fit(self, split: Split, report: Callable[[str], None]) -> Fitted:
        """Trains until the validation loss has not fallen for `patience` epochs.

        Args:
            split: what to train on and what to validate on.
            report: called with a line after each epoch.

        Raises:
            RlhfError: the validation loss never fell below that of the model at the start, or a
                loss is not finite.
        """
        start = self.scores()
        self._start_at(start, split.train)
        best = math.inf if self._new_head else self._validation_loss(split, start)
        at_start, best_epoch, losses = best, 0, []
        weights: dict[str, Tensor] = {}
        optimiser = self._optimiser()
        per_epoch = math.ceil(len(split.train) / self._settings.batch_size)
        for epoch in range(1, self._settings.epochs + 1):
            trained = self._epoch(epoch, per_epoch, split.train, optimiser)
            validation = self._validation_loss(split, self.scores())
            losses.append((trained, validation))
            better = validation < best
            report(
                f"epoch {epoch}: loss {trained:.3f}, on judgements for validation {validation:.3f}"
                + (" (best so far)" if better else "")
            )
            if not math.isfinite(trained + validation):
                raise RlhfError(
                    f"the loss is not finite in epoch {epoch}: lower the rate with "
                    f"--set learning_rate={self._rate / 10:g}"
                )
            if better:
                best, best_epoch = validation, epoch
                weights = _host_copy(self._model)
            elif epoch - best_epoch >= self._settings.patience:
                break
        if not best_epoch:
            raise RlhfError(
                f"training did not lower the loss on the judgements for validation ({at_start:.3f} "
                f"before it): nothing is written; judge more responses, or try --set "
                f"learning_rate={self._rate / 3:.2g}"
            )
        self._model.load_state_dict(weights)
        return Fitted(losses, best_epoch)

    def _start_at(self, scores: Tensor, judgements: Sequence[Judgement]) -> None:
        """Sets the score level to keep, and the best threshold for the initial model's scores.

        With a worse threshold, the validation loss could fall just because the threshold improves.
        """
        labels = [j for j in judgements if j.rejected is None]
        self._level = 0.0 if self._new_head else float(scores.mean())
        good = torch.tensor([float(j.good) for j in labels])
        threshold = best_threshold(scores[[j.response for j in labels]], good)
        with torch.no_grad():
            self._threshold.fill_(threshold)

    def _optimiser(self) -> torch.optim.Optimizer:
        weights = [p for p in self._model.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            [
                {"params": [p for p in weights if p.dim() > 1], "rate": self._rate},
                {"params": [p for p in weights if p.dim() <= 1], "rate": self._rate,
                 "weight_decay": 0.0},
                {"params": [self._threshold], "rate": THRESHOLD_RATE, "weight_decay": 0.0},
            ],
            lr=self._rate, weight_decay=self._settings.weight_decay,
        )  # fmt: skip

    def _epoch(
        self,
        epoch: int,
        per_epoch: int,
        judgements: Sequence[Judgement],
        optimiser: torch.optim.Optimizer,
    ) -> float:
        """Runs one pass in an order given by the seed. Returns the mean loss per judgement."""
        self._model.train()
        order = permutation(self._settings.seed, "reward epoch", (epoch,), len(judgements)).tolist()
        total, size = 0.0, self._settings.batch_size
        for number, first in enumerate(range(0, len(order), size)):
            batch = [judgements[i] for i in order[first : first + size]]
            update = (epoch - 1) * per_epoch + number
            factor = _rate_factor(update, per_epoch * self._settings.epochs)
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * factor
            rows = list(dict.fromkeys(i for j in batch for i in j.responses))
            scores = self._forward(rows)
            place = {row: k for k, row in enumerate(rows)}
            loss = self._loss(batch, scores, place)
            level = (scores.mean() - self._level) ** 2
            optimiser.zero_grad(set_to_none=True)
            (loss + self._settings.centre * level).backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), MAX_NORM)
            optimiser.step()
            total += float(loss.detach()) * len(batch)
        return total / len(judgements)

    def _loss(
        self, judgements: Sequence[Judgement], scores: Tensor, place: dict[int, int]
    ) -> Tensor:
        """The mean loss of judgements, given scores and the place of each response in them."""
        losses = []
        for judgement in judgements:
            score = scores[place[judgement.response]]
            if judgement.rejected is not None:
                losses.append(-logsigmoid(score - scores[place[judgement.rejected]]))
            else:
                sign = 1.0 if judgement.good else -1.0
                threshold = self._threshold.to(scores.device)
                losses.append(-self._settings.label_weight * logsigmoid(sign * (score - threshold)))
        return torch.stack(losses).mean()

    def _validation_loss(self, split: Split, scores: Tensor) -> float:
        with torch.no_grad():
            place = {i: i for i in range(len(scores))}
            return float(self._loss(split.validation, scores, place))


def best_threshold(scores: Tensor, good: Tensor) -> float:
    """Finds the threshold with the lowest logistic loss, by Newton's method.

    Args:
        scores: (n,) float32.
        good: (n,) float32, 1 for `good` and 0 for any other label.

    Returns:
        The mean score if the labels are of one kind; 0 for none.
    """
    if not len(scores):
        return 0.0
    threshold = float(scores.mean())
    if 0 < good.sum() < len(good):
        for _ in range(NEWTON_STEPS):
            p = torch.sigmoid(scores - threshold)
            step = float((good - p).sum() / (p * (1 - p)).sum().clamp(min=1e-6))
            threshold -= max(-1.0, min(1.0, step))
    return threshold


def _rate_factor(update: int, updates: int) -> float:
    """Returns the factor on the learning rate at an update, counted from 0."""
    warmup = max(1, math.ceil(WARMUP * updates))
    if update < warmup:
        return (update + 1) / warmup
    return 1 - (1 - FINAL) * (update - warmup) / max(1, updates - warmup)


def _host_copy(model: Any) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
