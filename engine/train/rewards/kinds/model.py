"""Reward source: a Hugging Face sequence classifier."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from engine import starter
from engine.config.sections.reward import RewardSource
from engine.errors import UserInputError
from engine.progress import ReportProgress
from engine.train.distributed import sharding
from engine.train.distributed.broadcast_files import broadcast_files, without_weights
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import full_tensor
from engine.train.models.cpu_layers import use_cpu_layers
from engine.train.models.pretrained import (
    load_tokenizer,
    read_model,
    read_shape,
    reward_options,
    shards_weights,
)
from engine.train.models.read_pretrained import ReadOptions
from engine.train.models.shapes import transformer_layers
from engine.train.models.stored_weights import share_stored
from engine.train.rewards.kinds.encoding import RewardEncoding
from engine.train.rewards.kinds.padding import reads_padding
from engine.train.rewards.source import LoadContext, RewardInputs, RunsOn, Score, SourceKind
from engine.train.rollout.token_states import TokenStates


class RewardModel:
    """Scores prompt and response by one logit of a classifier.

    :class:`~engine.train.rewards.kinds.encoding.RewardEncoding` says what it reads.
    """

    def __init__(self, source: RewardSource, context: LoadContext) -> None:
        """Reads the classifier on rank 0, and places its weights on every rank; a collective.

        See :mod:`engine.train.distributed.sharding`.

        Args:
            source: with `model`.
            context: the run.

        Raises:
            UserInputError: the classifier cannot be loaded, or `label` does not select a logit.
        """
        config, ranks, key = context.config, context.ranks, f"{context.key}.model"
        path, read = starter.resolve(source.value), reward_options(source)
        tokenizer = load_tokenizer(path, key, ranks, read)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        model = load_classifier(path, ranks, context.strategy, dtype, read, key)
        self._source = source.value
        self._label = label_index(source.value, source.label, model.config, context.key)
        model.config.use_cache = False  # a decoder would fill one for nothing
        self._model = model.eval().requires_grad_(False)
        self._device = ranks.device
        self._size = config.batch_size
        self._encoding = RewardEncoding(
            tokenizer, model, context.policy_vocabulary,
            max_tokens=config.max_tokens, pair=source.pair,
        )  # fmt: skip
        self._recorded: TokenStates | None = None
        """Receives the hidden states of scored responses inside :meth:`recorded_states`."""
        sharding.place_model(
            self._model, ranks, context.strategy, frozen=True, on_host=context.on_host
        )
        use_cpu_layers(self._model, ranks)
        with sharding.materialised(self._model):
            self._needs_mask = reads_padding(self._model, self._encoding, self._label, self._device)

    def __call__(self, inputs: RewardInputs, report: ReportProgress) -> list[Score]:
        """Computes the chosen logit for each response, in batches of similar lengths."""
        with sharding.materialised(self._model):
            return self._scores(inputs, report)

    @contextmanager
    def recorded_states(self) -> Iterator[TokenStates]:
        """Context manager that yields the hidden states of the last responses scored inside it.

        Call :meth:`check_states` first, once.
        """
        self._recorded = recorded = TokenStates()
        try:
            yield recorded
        finally:
            self._recorded = None

    def check_states(self) -> None:
        """Raises UserInputError unless :meth:`recorded_states` works for this model."""
        if not self._encoding.same_tokens:
            raise UserInputError(
                f"model.value: reward_model needs a reward model that reads the policy's tokens, "
                f"and '{self._source}' does not: set model.value: shared"
            )
        recorded_layers(self._model)

    def score_weights(self) -> list[float]:
        """Returns weights and bias of the layer that computes the score; all ranks must call it."""
        with sharding.materialised(self._model):
            layer = score_layer(self._model, "model.value")
            weight, bias = layer.weight, layer.bias
            values: list[float] = full_tensor(weight)[self._label].double().tolist()
            return [*values, 0.0 if bias is None else float(full_tensor(bias)[self._label])]

    @torch.no_grad()
    def _scores(self, inputs: RewardInputs, report: ReportProgress) -> list[Score]:
        messages = None
        if inputs.turns is not None:
            messages = [inputs.messages(i) for i in range(len(inputs))]
        encoded = self._encoding(inputs.batch.prompts, inputs.ids, inputs.texts, messages)
        order = encoded.by_length()
        scores: list[Score] = [None] * len(encoded)
        states: dict[int, Tensor] = {}
        for first in range(0, len(order), self._size):
            rows = order[first : first + self._size]
            batch = encoded.batch(rows, self._device, mask=self._needs_mask)
            self._model.config.pad_token_id = encoded.pad_of(rows)
            if self._recorded is None:
                logits = self._model(**batch).logits
            else:
                last, middle = recorded_layers(self._model)
                with inputs_of(last) as of_last, inputs_of(middle) as of_middle:
                    logits = self._model(**batch).logits
                for k, i in enumerate(rows):
                    length = len(encoded.sequences[i])
                    both = [of_last[0][k, :length], normalised(of_middle[0][k, :length])]
                    states[i] = states_before(torch.stack(both, dim=1), len(inputs.ids[i]))
            for i, score in zip(rows, logits[:, self._label].float().tolist(), strict=True):
                scores[i] = score
            report(first + len(rows), len(order))
        if self._recorded is not None:
            self._recorded.rows = list(range(len(states))) if inputs.rows is None else inputs.rows
            self._recorded.states = [states[i] for i in range(len(states))]
        return scores


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager that yields a list, which collects a layer's inputs."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _layer, inputs, named: found.append(inputs[0] if inputs else named["hidden_states"]),
        with_kwargs=True,
    )
    try:
        yield found
    finally:
        hook.remove()


def normalised(states: Tensor) -> Tensor:
    """Divides states (…, H) by their root mean square over H; zero states stay 0."""
    return functional.rms_norm(states.float(), states.shape[-1:], eps=1e-12).to(states.dtype)


def states_before(states: Tensor, response: int) -> Tensor:
    """Selects the states at the positions before each of the last `response` tokens.

    Args:
        states: of a sequence of L tokens; (L, …).
        response: number of response tokens. If a sequence is truncated on the left, its first
            response token may have no predecessor; the first state is used instead.

    Returns:
        (response, …) float32.
    """
    length = len(states)
    positions = torch.arange(length - 1 - response, length - 1, device=states.device)
    return states[positions.clamp(min=0)].float()


def recorded_layers(model: Any) -> tuple[nn.Module, nn.Module]:
    """The modules whose inputs are the states after the last layer and after half of the layers.

    Raises UserInputError.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    layers = transformer_layers(model, count)
    if not layers:
        raise UserInputError(
            f"model.value: {type(model).__name__} has no list of layers to read states from: set "
            "model.value: shared"
        )
    return score_layer(model, "model.value"), layers[len(layers) // 2]


def score_layer(model: Any, key: str) -> nn.Linear:
    """Returns the linear layer that computes the score from a decoder's hidden states.

    `key` is the configuration key that needs one, for the message. Raises UserInputError.
    """
    layer = getattr(model, "score", None)
    if not isinstance(layer, nn.Linear):
        raise UserInputError(
            f"{key}: {type(model).__name__} cannot become a value function: its score is not a "
            "linear layer on a decoder"
        )
    return layer


def load_classifier(
    path: str,
    ranks: RankGroup,
    strategy: str,
    dtype: torch.dtype,
    read: ReadOptions,
    key: str = "reward.model",
) -> Any:
    """Reads a sequence classifier on rank 0, and its shape on the others, on the meta device.

    Where that is possible, its weights stay in their files until it is placed.

    Raises:
        UserInputError: it cannot be loaded.
    """
    model, stored = None, None
    if ranks.is_lead:
        kind = AutoModelForSequenceClassification
        model, stored = read_model(kind, path, key, dtype, read)
    with broadcast_files(ranks, model and model.config) as folder:
        if model is None:
            shape = read_shape(path, folder, key, read)
            with without_weights(ranks):
                model = AutoModelForSequenceClassification.from_config(
                    shape, dtype=dtype, trust_remote_code=read.trust_remote_code
                )
    share_stored(model, stored, ranks, sharded=shards_weights(ranks, strategy))
    return model


def label_index(source: str, label: int | str | None, config: Any, key: str = "reward") -> int:
    """The index of the logit that is the score. Raises UserInputError."""
    count, names = config.num_labels, {v: k for k, v in (config.id2label or {}).items()}
    listed = ", ".join(f"{i}: {n}" for n, i in names.items())
    if label is None:
        if count == 1:
            return 0
        raise UserInputError(
            f"{key}.label: '{source}' has {count} labels: choose the one that is the score "
            f"({listed})"
        )
    if isinstance(label, str) and label in names:
        return int(names[label])
    if isinstance(label, int) and 0 <= label < count:
        return label
    raise UserInputError(f"{key}.label: '{source}' has no label {label!r} (it has {listed})")


KIND = SourceKind(
    runs_on=RunsOn.EVERY_RANK,
    load=RewardModel,
    default_name=lambda value: value.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1],
)
