"""Reward source: a Hugging Face sequence classifier."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from engine import starter
from engine.config.sections.reward import RewardConfig, RewardSource
from engine.errors import UserInputError
from engine.train.distributed import sharding
from engine.train.distributed.broadcast_files import broadcast_files, without_weights
from engine.train.distributed.ranks import RankGroup
from engine.train.models.onednn_linear import use_onednn
from engine.train.models.pretrained import (
    load_tokenizer,
    read_model,
    read_shape,
    reward_options,
    shards_weights,
)
from engine.train.models.read_pretrained import NO_OPTIONS, ReadOptions
from engine.train.models.stored_weights import share_stored
from engine.train.rewards.encoding import RewardEncoding
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, SourceKind
from engine.train.rollout.rollout import ReportProgress


class RewardModel:
    """Scores prompt and response by one logit of a classifier.

    :class:`~engine.train.rewards.encoding.RewardEncoding` says what it reads.
    """

    def __init__(
        self,
        source: str,
        label: int | str | None,
        config: RewardConfig,
        policy_vocabulary: dict[str, int],
        ranks: RankGroup,
        strategy: str = "ddp",
        *,
        pair: bool = False,
        read: ReadOptions = NO_OPTIONS,
    ) -> None:
        """Reads the classifier on rank 0 and its shape on the others; then call :meth:`place`.

        Args:
            source: a folder, a hub name, or a starter model.
            label: which logit is the score, by index or name; None if there is only one.
            config: dtype, batch size and token limit.
            policy_vocabulary: token ids by token.
            ranks: all ranks of this attempt.
            strategy: `ddp` or `fsdp`.
            pair: whether the tokenizer gets prompt and response as a pair of texts.
            read: how the classifier is read.

        Raises:
            UserInputError: the classifier cannot be loaded, or `label` does not select a logit.
        """
        path = starter.resolve(source)
        tokenizer = load_tokenizer(path, "reward.model", ranks, read)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        model = load_classifier(path, ranks, strategy, dtype, read)
        self._strategy = strategy
        self._label = label_index(source, label, model.config)
        model.config.use_cache = False  # a decoder would fill one for nothing
        use_onednn(model)
        self._model = model.eval().requires_grad_(False)
        self._device = ranks.device
        self._size = config.batch_size
        self._encoding = RewardEncoding(
            tokenizer, model, policy_vocabulary, max_tokens=config.max_tokens, pair=pair
        )

    def place(self, ranks: RankGroup, *, on_host: bool) -> None:
        """Places the weights on every rank; see :mod:`engine.train.distributed.sharding`."""
        sharding.place_model(self._model, ranks, self._strategy, on_host=on_host)
        sharding.offload_between_uses(self._model, ranks, self._strategy, on_host=on_host)

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[float | None]:
        """The chosen logit for each response, in batches of similar lengths."""
        with sharding.materialised(self._model):
            return self._scores(inputs, report)

    @torch.no_grad()
    def _scores(self, inputs: RewardInputs, report: ReportProgress) -> list[float | None]:
        encoded = self._encoding(inputs.batch.prompts, inputs.ids, inputs.texts)
        self._model.config.pad_token_id = encoded.pad
        order = encoded.by_length()
        scores: list[float | None] = [None] * len(encoded)
        for first in range(0, len(order), self._size):
            rows = order[first : first + self._size]
            logits = self._model(**encoded.batch(rows, self._device)).logits
            for i, score in zip(rows, logits[:, self._label].float().tolist(), strict=True):
                scores[i] = score
            report(first + len(rows), len(order))
        return scores


def load_classifier(
    path: str,
    ranks: RankGroup,
    strategy: str,
    dtype: torch.dtype,
    read: ReadOptions = NO_OPTIONS,
) -> Any:
    """Reads a sequence classifier on rank 0, and its shape on the others, on the meta device.

    With `fsdp` its weights stay in their files where that is possible.

    Raises:
        UserInputError: it cannot be loaded.
    """
    model, stored = None, None
    sharded = shards_weights(ranks, strategy)
    if ranks.is_lead:
        kind = AutoModelForSequenceClassification
        model, stored = read_model(kind, path, "reward.model", dtype, read, sharded=sharded)
    with broadcast_files(ranks, model and model.config) as folder:
        if model is None:
            shape = read_shape(path, folder, "reward.model", read)
            with without_weights(ranks):
                model = AutoModelForSequenceClassification.from_config(
                    shape, dtype=dtype, trust_remote_code=read.trust_remote_code
                )
    if sharded:
        share_stored(model, stored, ranks)
    return model


def label_index(source: str, label: int | str | None, config: Any) -> int:
    """The index of the logit that is the score. Raises UserInputError."""
    count, names = config.num_labels, {v: k for k, v in (config.id2label or {}).items()}
    listed = ", ".join(f"{i}: {n}" for n, i in names.items())
    if label is None:
        if count == 1:
            return 0
        raise UserInputError(
            f"reward.label: '{source}' has {count} labels: choose the one that is the score "
            f"({listed})"
        )
    if isinstance(label, str) and label in names:
        return int(names[label])
    if isinstance(label, int) and 0 <= label < count:
        return label
    raise UserInputError(f"reward.label: '{source}' has no label {label!r} (it has {listed})")


def _load(source: RewardSource, context: LoadContext) -> RewardModel:
    model = RewardModel(
        source.value, source.label, context.config, context.policy_vocabulary, context.ranks,
        context.strategy, pair=source.pair, read=reward_options(source),
    )  # fmt: skip
    model.place(context.ranks, on_host=context.on_host)
    return model


KIND = SourceKind(
    runs_on=RunsOn.EVERY_RANK,
    load=_load,
    default_name=lambda value: value.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1],
)
