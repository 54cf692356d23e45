"""The policy with its value head, and the frozen models it is held against."""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import starter
from engine.config import RunConfig
from engine.errors import UserInputError
from engine.train.handout import same_files, without_weights
from engine.train.parallel import Team
from engine.train.sharding import rest_on_host, settle, whole


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
        self._takes_positions = "position_ids" in inspect.signature(lm.forward).parameters

    def _keep_hidden(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    def forward(
        self, tokens: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """:meth:`run` in the chosen compute dtype."""
        mixed = self._compute is not torch.float32
        with torch.autocast(tokens.device.type, self._compute, enabled=mixed):
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


def load_policy(config: RunConfig, source: str, team: Team, strategy: str) -> LanguageModel:
    """The trainable policy in float32, with the value function its advantage needs."""
    value = config.model.value if config.ppo.advantage == "gae" else None
    lm = load_lm(source, "model.policy", team)
    with without_weights(team):
        policy = LanguageModel(lm, value, compute_dtype(config))
        if value == "separate":
            policy.value_trunk = _load_trunk(source, lm, team)
    if config.parallel.activation_checkpointing:
        _checkpoint_activations(policy)
    settle(_inert(policy), team, strategy, compute_dtype(config))
    return policy


def load_reference(config: RunConfig, team: Team, strategy: str) -> LanguageModel:
    """The frozen reference: the policy's own start, or the model that is named."""
    name = config.model.reference or config.model.policy
    key = "model.reference" if config.model.reference else "model.policy"
    dtype = compute_dtype(config)
    reference = LanguageModel(load_lm(starter.resolve(name), key, team), compute=dtype)
    reference.requires_grad_(False)
    on_host = config.parallel.frozen == "offload"
    settle(_inert(reference).to(dtype), team, "ddp" if on_host else strategy, dtype)
    if on_host:
        rest_on_host(reference, team.device)
    return reference


def compute_dtype(config: RunConfig) -> torch.dtype:
    """What `model.dtype` names."""
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32


def load_lm(source: str, key: str, team: Team) -> PreTrainedModel:
    """A causal language model in float32; its weights on rank 0, its shape on the others.

    Raises:
        UserInputError: names the configuration key and what is wrong with the model.
    """
    lm = _read_lm(source, key) if team.lead else None
    with same_files(team, *((lm.config, lm.generation_config) if lm else ())) as folder:
        if lm is None:
            with without_weights(team):
                shape = AutoConfig.from_pretrained(folder)
                lm = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
            lm.generation_config = GenerationConfig.from_pretrained(folder)
    return lm


def _read_lm(source: str, key: str) -> PreTrainedModel:
    try:
        lm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserInputError(_not_a_model(key, source, error)) from error
    for needed in ("past_key_values", "logits_to_keep"):
        if needed not in inspect.signature(lm.forward).parameters:
            raise UserInputError(f"{key}: {type(lm).__name__} cannot be used, it has no {needed}")
    return _own(lm)


def _load_trunk(source: str, lm: PreTrainedModel, team: Team) -> nn.Module:
    if team.lead:
        return _own(AutoModel.from_pretrained(source, dtype=torch.float32))
    return AutoModel.from_config(lm.config, dtype=torch.float32)


def load_tokenizer(source: str, key: str, team: Team) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, on every rank. Raises UserInputError."""
    tokenizer = None
    if team.lead:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserInputError(_not_a_model(key, source, error, "tokenizer")) from error
    with same_files(team, tokenizer) as folder:
        return tokenizer or AutoTokenizer.from_pretrained(folder)


def eos_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: chat models have several."""
    of_model = getattr(lm.generation_config, "eos_token_id", None)
    ids = of_model if isinstance(of_model, list) else [of_model]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def fingerprint(module: nn.Module) -> str:
    """A hash of all weights, to tell whether a frozen model is the one it was.

    Adds up each tensor's bits rather than feeding them to a cryptographic hash: seconds for
    billions of weights, and it guards against accidents, not attackers. Of a sharded model every
    rank must ask.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        bits = whole(tensor).detach().contiguous().view(-1).view(torch.uint8)
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
        elif isinstance(getattr(part, "attention_dropout", None), float):
            vars(part)["attention_dropout"] = 0.0  # used as a number, and only in training mode
    return module.eval()


def _checkpoint_activations(policy: LanguageModel) -> None:
    """Activations are computed again in the backward pass; takes effect in training mode alone."""
    for part in (policy.lm, policy.value_trunk):
        if isinstance(part, PreTrainedModel):
            part.gradient_checkpointing_enable({"use_reentrant": False})


def _not_a_model(key: str, source: str, error: Exception, what: str = "model") -> str:
    if source.startswith(("/", ".", "~")):
        problem = "holds none that can be loaded" if Path(source).is_dir() else "does not exist"
        return f"{key}: the folder {source} {problem} (wanted: a Hugging Face {what} folder)"
    first = str(error).strip().splitlines()[0]
    return (
        f"{key}: '{source}' is neither a {what} folder here nor one to be had from the hub: {first}"
    )
