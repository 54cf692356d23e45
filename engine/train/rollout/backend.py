"""What generates responses: the interface, the backends there are, and their use over the ranks.

To add a backend, write a module with a class that has :meth:`RolloutBackend.generate` and list it
in :data:`BACKENDS`. What a backend returns is held against a full forward pass of the policy once
an attempt (:mod:`engine.train.rollout_check`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.train.data.prompts import Prompt, PromptBatch, batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import AnyModel
from engine.train.rollout.native import NativeBackend
from engine.train.rollout.rollout import ReportProgress, Rollout, merge_rollouts
from engine.train.rollout.stop_criteria import StopCriteria


class RolloutBackend(Protocol):
    """Generates responses with a model's present weights."""

    def generate(
        self,
        model: AnyModel,
        batch: PromptBatch,
        uniforms: Tensor,
        temperature: float,
        *,
        per_prompt: int,
        report: ReportProgress,
    ) -> Rollout:
        """A response to each prompt, with its log-probabilities at the temperature.

        Every rank calls it at the same time, each with its own prompts.

        Args:
            model: in evaluation mode; its weights may have changed since the last call.
            batch: B prompts.
            uniforms: (B, T) in [0, 1); T is the limit of new tokens. They alone decide what is
                drawn, so that a resumed run draws the same.
            temperature: > 0.
            per_prompt: so many neighbouring rows have the same prompt.
            report: called now and then with (tokens done, T).
        """


BACKENDS: dict[str, Callable[[StopCriteria, PreTrainedTokenizerBase], RolloutBackend]] = {
    "native": NativeBackend,
}
"""By name; the values make a backend of when a response ends and the policy's tokenizer."""


@dataclass(frozen=True)
class SamplingOptions:
    """What decides, with model and prompts, which tokens are drawn."""

    seed: int
    step: int
    temperature: float
    max_new_tokens: int
    per_prompt: int = 1
    """Responses to each prompt; they lie next to each other."""


def generate_responses(
    backend: RolloutBackend,
    model: AnyModel,
    prompts: list[Prompt],
    options: SamplingOptions,
    tokenizer: PreTrainedTokenizerBase,
    ranks: RankGroup | None = None,
    report: ReportProgress = lambda _done, _total: None,
) -> Rollout:
    """The model's responses to some prompts, all of them on every rank.

    With `ranks` each generates those to a stretch of the prompts, of which there must be at least
    as many as ranks; without, each generates all of them for itself.
    """
    per_prompt, limit = options.per_prompt, options.max_new_tokens
    batch = batch_prompts(prompts, per_prompt, tokenizer.eos_token_id or 0)
    uniforms = sampling_uniforms(options.seed, options.step, len(batch.prompts), limit)
    own = torch.arange(len(batch.prompts)) if ranks is None else own_rows(ranks, batch, per_prompt)
    part = backend.generate(
        model, batch.select(own), uniforms[own], options.temperature,
        per_prompt=per_prompt, report=report,
    )  # fmt: skip
    return part if ranks is None else merge_rollouts(ranks, batch, part, own, limit, tokenizer)


def own_rows(ranks: RankGroup, batch: PromptBatch, per_prompt: int) -> Tensor:
    """This rank's rows of the batch, (n,) int64: all responses to a stretch of the prompts."""
    share = ranks.contiguous_share(len(batch.prompts) // per_prompt)
    return torch.arange(share.start * per_prompt, share.stop * per_prompt)
