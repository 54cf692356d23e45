"""The sizes of a run's models, from their configurations: ``python -m engine.train.models.shapes``.

Reads a run's configuration as JSON on standard input and writes
:class:`engine.memory.model.Models`, or
what is wrong with the input, as JSON on standard output. The models are built on torch's meta
device, where parameters have shapes and no memory: no weights are read, and none need be there.
"""

import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from engine import starter
from engine.config.file import DATA_FILES
from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.memory.model import Models, Shape
from engine.train.data.prompts import load_prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.models.pretrained import load_tokenizer

QUICKLY_READ = 20_000_000
"""Bytes of a prompt file up to which its prompts are looked at; else the bound stands for them."""


def main() -> None:
    """Answers one question and ends."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=RunConfig)
    try:
        answer: Any = look(config)
    except UserInputError as error:
        answer = {"error": str(error)}
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")


def look(config: RunConfig) -> Models:
    """The shapes of everything, and the longest prompt. Raises UserInputError."""
    alone = RankGroup(config.launch)
    exact, tokens = False, config.data.max_prompt_tokens
    if _quickly_read(config.data.prompts):
        tokenizer = load_tokenizer(starter.resolve(config.model.policy), "model.policy", alone)
        tokens, exact = load_prompts(config.data, tokenizer, per_step=1, seed=0).longest, True
    device = "cuda" if alone.device.type == "cuda" else "cpu"
    return models_of(config, tokens, device, exact=exact)


def models_of(config: RunConfig, prompt_tokens: int, device: str, *, exact: bool = True) -> Models:
    """What is planned with, as seen by this very process. Raises UserInputError."""
    policy = shape_of(config.model.policy, "model.policy", AutoModelForCausalLM)
    reference = policy
    if config.model.reference is not None:
        reference = shape_of(config.model.reference, "model.reference", AutoModelForCausalLM)
    named = [s.model for s in config.reward.sources() if s.model is not None]
    kind = AutoModelForSequenceClassification
    return Models(
        policy=policy,
        reference=reference,
        rewards=[shape_of(name, "reward.model", kind) for name in named],
        prompt_tokens=prompt_tokens,
        exact_prompts=exact,
        process=psutil.Process().memory_info().rss,
        device="cuda" if device == "cuda" else "cpu",
    )


def shape_of(name: str, key: str, kind: Any) -> Shape:
    """A model's sizes.

    Args:
        name: a folder, a hub id, or a starter model.
        key: the configuration key that names it, for the error.
        kind: the transformers Auto class it is used as.

    Raises:
        UserInputError: it has no configuration that transformers can build a model from.
    """
    try:
        config = AutoConfig.from_pretrained(starter.resolve(name))
        with torch.device("meta"):
            model = kind.from_config(config)
        return _shape(model, config.get_text_config())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        # As many ways as there are architectures; whichever, the name and the reason help.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserInputError(f"{key}: cannot plan with '{name}': {first}") from error


def _shape(model: Any, config: Any) -> Shape:
    layers = _layers(model, config.num_hidden_layers)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    return Shape(
        parameters=_count(model),
        head=0 if tied else _count(head),
        largest_layer=max(map(_count, layers), default=0),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=heads * size,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * size,
        intermediate=_intermediate(config),
        vocabulary=config.vocab_size,
        linear=_linear(layers),
    )


def _layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The repeated blocks: the first list of as many modules as the configuration has layers."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, []))


def _intermediate(config: Any) -> int:
    """The MLP's width; of a mixture, that of the experts a token goes through."""
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        width = experts * (getattr(config, "moe_intermediate_size", None) or width)
    return int(width or 4 * config.hidden_size)


def _linear(layers: list[nn.Module]) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in layers:
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                name = path.rsplit(".", 1)[-1]
                found[name] = found.get(name, 0) + sum(module.weight.shape)
    return found


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _quickly_read(prompts: str) -> bool:
    path = Path(starter.resolve(prompts))
    return path.suffix.lower() in DATA_FILES and (
        not path.is_file() or path.stat().st_size <= QUICKLY_READ  # a missing one is told of there
    )


if __name__ == "__main__":
    main()
