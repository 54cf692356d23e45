"""The policy with its value head, and the frozen models it is held against."""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import starter
from engine.config import RunConfig
from engine.errors import UserInputError
from engine.train import lora


class LanguageModel(nn.Module):
    """A causal language model, with a value function where one is asked for.

    Policy and value head are one module entered by its own forward: sharded and wrapped modules
    work only when entered at the root.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        value: str | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        """Wraps a model.

        Args:
            lm: the language model, with its head.
            value: None, `shared` or `separate` (a trunk of its own, which the caller sets).
            compute: what matrix products are computed in; weights keep their own dtype.
        """
        super().__init__()
        self.lm = lm
        self._compute = compute
        self.value_trunk: nn.Module | None = None
        self.value_head: nn.Linear | None = None
        head = lm.get_output_embeddings()
        if value is not None:
            # Zero-initialised: the first advantages come from the rewards alone.
            self.value_head = nn.Linear(head.in_features, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        if value == "shared":
            # The head's input: the trunk's last hidden state, exactly at the positions kept.
            head.register_forward_pre_hook(self._keep_hidden)
        self._hidden: Tensor | None = None
        self._adapted = lora.adapted_layers(lm)
        self._takes_positions = "position_ids" in inspect.signature(lm.forward).parameters

    def _keep_hidden(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def forward(
        self, tokens: Tensor, *args: Any, adapters: bool = True, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`run` in the chosen compute dtype, with or without the adapters there may be.

        That is an argument, not a state, so that it reaches a wrapped or sharded model as well, and
        ends with the call. Not for two threads at once.
        """
        mixed = self._compute is not torch.float32
        with ExitStack() as stack:
            if not adapters:
                stack.enter_context(lora.switched_off(self._adapted))
            stack.enter_context(torch.autocast(tokens.device.type, self._compute, enabled=mixed))
            return self.run(tokens, *args, **kwargs)

    def run(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        keep: int,
        *,
        cache: Any = None,
        want: str = "both",
        detach_trunk: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and values at the last `keep` positions.

        Args:
            tokens: (n, L) int64.
            attention_mask: (n, L), or (n, past + L) with a cache; left padding is 0.
            keep: positions wanted, from the end.
            cache: a transformers cache, filled along the way.
            want: `both`, `logits` or `values`.
            detach_trunk: hold the value's gradient back from the trunk.

        Returns:
            logits (n, keep, V) in the model's dtype; values (n, keep) float32, None without a
            value function.
        """
        # Positions from the mask: left padding must not shift them (trl#6819: 34 nats off).
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        if self._takes_positions:
            inputs["position_ids"] = positions
        logits, values = None, None
        separate = self.value_trunk is not None
        if want != "values" or not separate:
            logits = self.lm(
                input_ids=tokens,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
                **inputs,
            ).logits
        if self.value_head is None or want == "logits":
            self._hidden = None
            return logits, None
        if separate:
            trunk = self.value_trunk
            hidden = trunk(input_ids=tokens, **inputs).last_hidden_state[:, -keep:]  # type: ignore[misc]
        else:
            hidden, self._hidden = self._hidden, None
        # A trunk of the value's own may learn whenever the value does.
        hidden = hidden.detach() if detach_trunk and not separate else hidden
        # One product a token: kept exact.
        with torch.autocast(tokens.device.type, enabled=False):
            values = self.value_head(hidden.float()).squeeze(-1)
        return logits, values


class BaseView:
    """The model under a policy's adapters, used like a :class:`LanguageModel`; no copy of it.

    It gives logits alone, and enters the policy's own forward, so it works where that is wrapped or
    sharded.
    """

    def __init__(self, policy: LanguageModel) -> None:
        self.lm = policy.lm
        self._model = policy

    def __call__(
        self, tokens: Tensor, attention_mask: Tensor, keep: int, *, cache: Any = None, **_: Any
    ) -> tuple[Any, None]:
        """As :meth:`LanguageModel.run`, with `want="logits"`."""
        logits, _values = self._model(
            tokens, attention_mask, keep, cache=cache, want="logits", adapters=False
        )
        return logits, None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights without the adapters."""
        return (p for p in self.lm.parameters() if not p.requires_grad)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights without the adapters, named as in a model that never had any."""
        return {f"lm.{name}": tensor for name, tensor in lora.base_tensors(self.lm).items()}


AnyModel = LanguageModel | BaseView
"""What generates and scores: the policy, or either kind of reference."""


def load_policy(config: RunConfig, source: str, device: torch.device) -> LanguageModel:
    """The trainable policy, with the value function its advantage needs.

    Trained weights are float32. With `lora.rank` only the adapters and the value head are trained;
    the weights under them are held in `model.dtype`, once more for a value trunk of its own.

    Args:
        config: the run's.
        source: the model to start from, or a checkpoint's `policy/` folder.
        device: where it goes.

    Raises:
        UserInputError: the model or the adapters' targets cannot be used.
        CheckpointError: the checkpoint holds adapters and the configuration asks for none, or the
            other way round.
    """
    value = config.model.value if config.ppo.advantage == "gae" else None
    adapted = config.lora.rank is not None
    base = starter.resolve(config.model.policy) if adapted else source
    dtype = compute_dtype(config) if adapted else torch.float32
    lm = load_lm(base, "model.policy", dtype)
    if adapted:
        lora.add_adapters(lm, config.lora, seed=config.seed, base=base)
        if source != base:
            lora.load_adapters(lm, Path(source))
    policy = LanguageModel(lm, value, compute_dtype(config))
    if value == "separate":
        trunk = _own(AutoModel.from_pretrained(base, dtype=dtype))
        if adapted:
            lora.add_adapters(trunk, config.lora, seed=config.seed, base=base)
        policy.value_trunk = trunk
    return _inert(policy).to(device)


def load_reference(config: RunConfig, policy: LanguageModel, device: torch.device) -> AnyModel:
    """The frozen reference: the policy's own start, or the model that is named.

    With adapters the former is the policy itself without them; a model that is named is loaded
    besides, for it need not be the one that is adapted.
    """
    name = config.model.reference or config.model.policy
    if config.lora.rank is not None and name == config.model.policy:
        return BaseView(policy)
    key = "model.reference" if config.model.reference else "model.policy"
    dtype = compute_dtype(config)
    reference = LanguageModel(load_lm(starter.resolve(name), key, dtype), compute=dtype)
    reference.requires_grad_(False)
    return _inert(reference).to(device)


def save_lm(lm: PreTrainedModel, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes a Hugging Face model folder, or peft's adapter folder where there are adapters.

    Args:
        lm: the language model.
        folder: made if need be.
        state_dict: the model's, where its own tensors are not whole (sharded).
    """
    if lora.adapted_layers(lm):
        lora.save_adapters(lm, folder, state_dict)
    else:
        lm.save_pretrained(folder, state_dict=state_dict)


def compute_dtype(config: RunConfig) -> torch.dtype:
    """What `model.dtype` names."""
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32


def load_lm(source: str, key: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model, its weights in a dtype.

    Raises:
        UserInputError: names the configuration key and what is wrong with the model.
    """
    try:
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserInputError(_not_a_model(key, source, error)) from error
    if lora.adapted_layers(lm):
        raise UserInputError(
            f"{key}: {source} holds adapters for another model; merge the two first "
            "(rlhf-tui export NAME --policy DIR --merged, or peft)"
        )
    for needed in ("past_key_values", "logits_to_keep"):
        if needed not in inspect.signature(lm.forward).parameters:
            raise UserInputError(f"{key}: {type(lm).__name__} cannot be used, it has no {needed}")
    return _own(lm)


def load_tokenizer(source: str, key: str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises UserInputError."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserInputError(_not_a_model(key, source, error, "tokenizer")) from error


def eos_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: chat models have several."""
    of_model = getattr(lm.generation_config, "eos_token_id", None)
    ids = of_model if isinstance(of_model, list) else [of_model]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def fingerprint(module: nn.Module | BaseView) -> str:
    """A hash of all weights, to tell whether a frozen model is the one it was.

    Adds up each tensor's bits rather than feeding them to a cryptographic hash: seconds for
    billions of weights, and it guards against accidents, not attackers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if len(bits) % 4 == 0:
            bits = bits.view(torch.int32)
        total = int(bits.sum(dtype=torch.int64))
        weighted = int((bits[:: max(1, len(bits) // 1024)].to(torch.int64) * 31).cumsum(0).sum())
        digest.update(f"{name}:{tuple(tensor.shape)}:{total}:{weighted};".encode())
    return digest.hexdigest()


def _own(module: nn.Module) -> Any:
    """Copies the weights out of the file.

    Fresh from `from_pretrained` they are memory-mapped at odd offsets, which picks other kernels:
    one-row products then differ in the last bit between a first run and a resumed one.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return module


def _inert(module: LanguageModel) -> LanguageModel:
    """Dropout off for good: old and new log-probabilities must be of the same function."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module.eval()


def _not_a_model(key: str, source: str, error: Exception, what: str = "model") -> str:
    if source.startswith(("/", ".", "~")):
        problem = "holds none that can be loaded" if Path(source).is_dir() else "does not exist"
        return f"{key}: the folder {source} {problem} (wanted: a Hugging Face {what} folder)"
    first = str(error).strip().splitlines()[0]
    return (
        f"{key}: '{source}' is neither a {what} folder here nor one to be had from the hub: {first}"
    )
