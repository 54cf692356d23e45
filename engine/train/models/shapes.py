"""Determines the shapes of a run's models: ``python -m engine.train.models.shapes``.

Reads a :class:`engine.config.schema.RunConfig` as JSON from standard input. The last line of
standard output is :class:`engine.memory.model.Models` or an object with `error`, as JSON. The
models are built on the meta device from their configurations, so their weights are neither read
nor needed.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from engine import starter
from engine.config.paths import DATA_FILES
from engine.config.schema import RunConfig
from engine.errors import UserInputError, first_line
from engine.examined import examined
from engine.launch.environment import torch_version
from engine.memory.model import Models, Shape
from engine.protocol.programs.result import print_result
from engine.train.data.load_prompts import load_prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.models.activations.recomputed import is_gated_mlp
from engine.train.models.pretrained import load_policy_tokenizer, policy_options, reward_options
from engine.train.models.read_pretrained import NO_OPTIONS, ReadOptions, read_pretrained
from engine.train.models.stored_weights import joins_tensors

MAX_PROMPT_FILE = 20_000_000
"""In bytes. For larger files `data.max_prompt_tokens` is used instead of the longest prompt."""

MANY_SCORE_TENSORS = {"bloom": 5, "gpt_oss": 5, "mpt": 4}
"""Architecture → :attr:`Shape.score_tensors`, where it is more than for others: BLOOM and MPT add
the bias of positions and the mask to their scores, gpt-oss a column, and a bfloat16 copy becomes
float32."""
KERNEL_FOR_ONE_KEY = (2, 15)
"""The version of torch since which it has a fused kernel for one key for all heads, on a CPU."""


def main() -> None:
    """Reads one configuration and prints the result; a device may be the argument."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=examined(RunConfig))
    device = torch.device(sys.argv[1]) if len(sys.argv) > 1 else None
    print_result(lambda: describe_models(config, device))


def describe_models(config: RunConfig, device: torch.device | None = None) -> Models:
    """Returns the shapes of all models, and the longest prompt's length if the file is small.

    Args:
        config: the configuration of the run.
        device: of the ranks, which this machine need not have. Default: the configured one.

    Raises:
        UserInputError: a model or the prompts cannot be read.
    """
    ranks = RankGroup(config.launch)
    exact, tokens = False, config.data.max_prompt_tokens
    if all(_is_quick_to_read(source.path) for source in config.data.sources):
        source = starter.resolve(config.model.policy)
        tokenizer = load_policy_tokenizer(config, source, ranks)
        tokens, exact = load_prompts(config.data, tokenizer, per_step=1, seed=0).longest, True
    return models_of(config, tokens, device or ranks.device, exact=exact)


def models_of(
    config: RunConfig, prompt_tokens: int, device: torch.device, *, exact: bool = True
) -> Models:
    """Builds the planner's input; `process` is the resident memory of the calling process.

    Args:
        config: the configuration of the run.
        prompt_tokens: length of the longest prompt, or an upper bound.
        device: of the ranks.
        exact: whether `prompt_tokens` is the length rather than a bound.

    Raises:
        UserInputError: the shape of a model cannot be determined.
    """
    read = policy_options(config, starter.resolve(config.model.policy))
    shape = partial(shape_of, on_cpu=device.type == "cpu")
    policy = shape(config.model.policy, "model.policy", AutoModelForCausalLM, read)
    reference = policy
    if config.model.reference is not None:
        read = replace(read, revision=config.model.reference_revision, gguf_file=None)
        reference = shape(config.model.reference, "model.reference", AutoModelForCausalLM, read)
    kind = AutoModelForSequenceClassification
    return Models(
        policy=policy,
        reference=reference,
        rewards=[
            shape(str(s.model), "reward.model", kind, reward_options(s))
            for s in config.reward.models()
        ],
        prompt_tokens=prompt_tokens,
        exact_prompts=exact,
        process=psutil.Process().memory_info().rss,
        device="cuda" if device.type == "cuda" else "cpu",
    )


def shape_of(
    name: str, key: str, kind: Any, read: ReadOptions = NO_OPTIONS, *, on_cpu: bool = True
) -> Shape:
    """Determines the shape of a model.

    Args:
        name: a folder, a hub id, or a starter model.
        key: the configuration key that names the model, for error messages.
        kind: the transformers Auto class that loads it.
        read: how it is read.
        on_cpu: whether it runs on a CPU.

    Raises:
        UserInputError: transformers cannot build the model from its configuration.
    """
    try:
        config = read_pretrained(AutoConfig, starter.resolve(name), key, "configuration", read)
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=read.trust_remote_code)
        eager = read.attn_implementation == "eager"
        return _shape(model, config.get_text_config(), eager=eager, on_cpu=on_cpu)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        # The type of the error depends on the architecture.
        text = f"{key}: cannot determine the shape of '{name}': {first_line(error)}"
        raise UserInputError(text) from error


def _shape(model: Any, config: Any, *, eager: bool, on_cpu: bool) -> Shape:
    layers = transformer_layers(model, config.num_hidden_layers)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    # transformers falls back to eager for architectures that it supports no other attention for.
    eager = eager or model.config.get_text_config()._attn_implementation == "eager"
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
        in_linear=sum(
            m.weight.numel()
            for layer in layers
            for m in layer.modules()
            if isinstance(m, nn.Linear | Conv1D)
        ),
        linear=_linear(layers, lambda m: sum(m.weight.shape)),
        outputs=_linear(layers, lambda m: m.weight.shape[0 if isinstance(m, nn.Linear) else 1]),
        window=_window(config),
        mask_heads=heads if config.model_type == "falcon" and config.alibi else 1,
        score_heads=heads if eager or _shares_keys_without_kernel(config, on_cpu=on_cpu) else 0,
        capped_scores=getattr(config, "attn_logit_softcapping", None) is not None,
        score_tensors=_score_tensors(config, eager=eager),
        ignores_padding=is_classifier_on_decoder(model),
        read_whole=joins_tensors(model),
        recomputes_products=not getattr(config, "num_experts_per_tok", None)
        and all(map(partial(_is_gated, width=_intermediate(config)), layers)),
    )


def is_classifier_on_decoder(model: Any) -> bool:
    """Whether a model is one of transformers' classifiers on the last token of a decoder.

    Those do not read padding at the end, unless the decoder attends to what follows a token. One
    with custom code may find the last token by the mask.
    """
    own = type(model).__module__.startswith("transformers.")
    return own and isinstance(getattr(model, "score", None), nn.Linear)


def _window(config: Any) -> int | None:
    if config.model_type == "falcon":
        return 1  # transformers always makes its mask
    names = ("sliding_window", "attention_chunk_size")
    return next((int(w) for w in (getattr(config, n, None) for n in names) if w), None)


def _score_tensors(config: Any, *, eager: bool) -> int:
    if config.model_type != "falcon":
        return MANY_SCORE_TENSORS.get(config.model_type, 3)
    return (5 if config.alibi else 4) if eager else 2


def _shares_keys_without_kernel(config: Any, *, on_cpu: bool) -> bool:
    """Whether it is a Falcon with one key for all heads, for which no fused kernel may be used."""
    one_key = getattr(config, "multi_query", False) and not config.new_decoder_architecture
    has_kernel = on_cpu and torch_version() >= KERNEL_FOR_ONE_KEY
    return config.model_type == "falcon" and bool(one_key) and not has_kernel


def transformer_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """Returns the transformer blocks: the first ModuleList as long as the number of layers."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    return list(next(lists, []))


def _intermediate(config: Any) -> int:
    """Returns the MLP width; for a mixture of experts, summed over the experts a token uses."""
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        width = experts * (getattr(config, "moe_intermediate_size", None) or width)
    return int(width or 4 * config.hidden_size)


def _is_gated(layer: nn.Module, width: int) -> bool:
    """Whether a layer has one MLP of its width, of the kind whose products are computed again."""
    gated = (m.down_proj for m in layer.modules() if is_gated_mlp(m))
    return any(isinstance(down, nn.Linear) and down.in_features == width for down in gated)


def _linear(layers: list[nn.Module], size: Callable[[nn.Linear | Conv1D], int]) -> dict[str, int]:
    """Sums a size of the linear modules of each name."""
    found: dict[str, int] = {}
    for layer in layers:
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                name = path.rsplit(".", 1)[-1]
                found[name] = found.get(name, 0) + size(module)
    return found


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_quick_to_read(prompts: str) -> bool:
    path = Path(starter.resolve(prompts))
    return path.suffix.lower() in DATA_FILES and (
        not path.is_file()
        or path.stat().st_size <= MAX_PROMPT_FILE  # load_prompts reports a missing file
    )


if __name__ == "__main__":
    main()
