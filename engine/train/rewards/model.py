"""Reward source: a Hugging Face sequence classifier."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from engine import starter
from engine.config.sections.reward import RewardConfig, RewardSource
from engine.errors import UserInputError
from engine.train.data.chat_template import render_chat
from engine.train.data.prompts import Prompt
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
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, SourceKind
from engine.train.rollout.rollout import ReportProgress


class RewardModel:
    """Scores prompt and response by one logit of a classifier.

    A classifier with the policy's vocabulary gets the prompt's and the response's token ids,
    end-of-sequence token included. Any other gets the text, tokenised by its own tokenizer and, for
    chat prompts, rendered by its own chat template; or prompt and response as a pair of texts.
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
        self._tokenizer = load_tokenizer(path, "reward.model", ranks, read)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        model = load_classifier(path, ranks, strategy, dtype, read)
        self._strategy = strategy
        self._label = label_index(source, label, model.config)
        self._pad = _pad_id(self._tokenizer, model.config)
        model.config.use_cache = False  # a decoder would fill one for nothing
        use_onednn(model)
        self._model = model.eval().requires_grad_(False)
        self._device = ranks.device
        self._size = config.batch_size
        self._limit = min(config.max_tokens, _positions(model) or config.max_tokens)
        self._pair = pair
        self._same_tokens = not pair and self._tokenizer.get_vocab() == policy_vocabulary
        if not self._same_tokens:
            # The end of the response counts; special tokens at the start are kept.
            self._tokenizer.truncation_side = "left"
            self._limit = min(self._limit, self._tokenizer.model_max_length)

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
        sequences, types = self._sequences(inputs)
        pad = _unused_id(sequences) if self._pad is None else self._pad
        self._model.config.pad_token_id = pad
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        scores: list[float | None] = [None] * len(sequences)
        for first in range(0, len(order), self._size):
            rows = order[first : first + self._size]
            width = len(sequences[rows[0]])
            ids = torch.full((len(rows), width), pad)
            mask, kinds = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
            for k, i in enumerate(rows):
                ids[k, : len(sequences[i])] = torch.tensor(sequences[i])
                mask[k, : len(sequences[i])] = 1
                if types is not None:
                    kinds[k, : len(types[i])] = torch.tensor(types[i])
            more = {} if types is None else {"token_type_ids": kinds.to(self._device)}
            logits = self._model(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device), **more
            ).logits
            for i, score in zip(rows, logits[:, self._label].float().tolist(), strict=True):
                scores[i] = score
            report(first + len(rows), len(order))
        return scores

    def _sequences(self, inputs: RewardInputs) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of prompt and response; the last tokens if there are too many.

        With them the token types, if the tokenizer tells the texts of a pair apart by them.
        """
        prompts = inputs.batch.prompts
        if self._same_tokens:
            joined = [p.ids + ids for p, ids in zip(prompts, inputs.ids, strict=True)]
            return [ids[-self._limit :] for ids in joined], None
        encoded = [self._encode(p, t) for p, t in zip(prompts, inputs.texts, strict=True)]
        sequences = [list(e["input_ids"]) for e in encoded]
        if not self._pair or "token_type_ids" not in encoded[0]:
            return sequences, None
        return sequences, [list(e["token_type_ids"]) for e in encoded]

    def _encode(self, prompt: Prompt, response: str) -> Any:
        """What the classifier's own tokenizer makes of a prompt and a response."""
        if self._pair:
            return self._encode_pair(prompt.plain, response)
        if prompt.messages is not None and self._tokenizer.chat_template:
            messages = [*prompt.messages, {"role": "assistant", "content": response}]
            text = render_chat(self._tokenizer, messages, "reward.model")
            # The template writes the special tokens itself.
            return self._tokenizer(
                text, add_special_tokens=False, truncation=True, max_length=self._limit
            )
        return self._tokenizer(prompt.text + response, truncation=True, max_length=self._limit)

    def _encode_pair(self, prompt: str, response: str) -> Any:
        """The pair; the prompt's first tokens are left out if it is too long."""
        needed = len(self._tokenizer("", response)["input_ids"])
        strategy = "only_first" if needed < self._limit else "longest_first"
        return self._tokenizer(prompt, response, truncation=strategy, max_length=self._limit)


def _positions(model: Any) -> int | None:
    """The most tokens that a model can read; None if its positions have no limit."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa counts positions from the one after that of padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return int(limit - module.padding_idx - 1)
    return limit


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


def _pad_id(tokenizer: Any, config: Any) -> int | None:
    """The classifier's pad token id; None if it is also the end-of-sequence token.

    Decoder classifiers of transformers take the score at the last token that is not pad. If pad and
    end of sequence are the same token, that is the token before the end.
    """
    pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    return None if pad is None or pad == tokenizer.eos_token_id else int(pad)


def _unused_id(sequences: list[list[int]]) -> int:
    """The smallest token id that occurs in none of the sequences, to pad with."""
    used = {i for ids in sequences for i in ids}
    return next(i for i in range(len(used) + 1) if i not in used)


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
