"""Generates with the trained model itself, by sampling from the full distribution."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from engine.config.sections.rollout import RolloutConfig
from engine.progress import ReportProgress, report_nothing
from engine.train.distributed.sharding import blocks, with_materialised_model
from engine.train.models.language_model import AnyModel
from engine.train.rollout.context import BackendContext
from engine.train.rollout.native.compiled_layers import CompiledLayers
from engine.train.rollout.native.decoder import Decoder
from engine.train.rollout.native.schedule import Schedule, schedule_for
from engine.train.rollout.native.slots import Responses
from engine.train.rollout.native.transposed_weights import transposed_weights
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import OnEnded, Rollout
from engine.train.rollout.stop_criteria import StopCriteria


@dataclass(frozen=True)
class NativeBackend:
    """Generates with the model itself, on the device it is placed on; see :func:`generate`."""

    stop_criteria: StopCriteria
    tokenizer: PreTrainedTokenizerBase
    config: RolloutConfig
    compiled: CompiledLayers = field(default_factory=lambda: CompiledLayers("never"))
    separate: bool = False

    @classmethod
    def of(cls, context: BackendContext) -> "NativeBackend":
        """Creates the backend of a run."""
        config = context.config.rollout
        # The compiler copies the arguments of liger's kernels: it cannot tell which ones they
        # write.
        fused = context.config.model.kernels == "liger"
        when = "never" if fused and config.compile == "auto" else config.compile
        return cls(context.stop_criteria, context.tokenizer, config, CompiledLayers(when))

    def sync(self, model: AnyModel, weights_version: int, report: ReportProgress) -> None:
        """Does nothing, since the backend generates with the model itself."""

    def generate(
        self,
        model: AnyModel,
        request: RolloutRequest,
        report: ReportProgress = report_nothing,
        on_ended: OnEnded | None = None,
    ) -> Rollout:
        """See :func:`generate`."""
        return generate(
            model, request, self.stop_criteria, self.tokenizer, report,
            at_once=self.config.at_once, sampling=self.config.sampling, compiled=self.compiled,
            on_ended=on_ended,
        )  # fmt: skip


@torch.no_grad()
@with_materialised_model
def generate(
    model: AnyModel,
    request: RolloutRequest,
    stop_criteria: StopCriteria,
    tokenizer: PreTrainedTokenizerBase,
    report: ReportProgress = report_nothing,
    *,
    at_once: int | None = None,
    sampling: str = "gumbel",
    schedule: Schedule | None = None,
    compiled: CompiledLayers | None = None,
    on_ended: OnEnded | None = None,
) -> Rollout:
    """Samples a response to each prompt from the full distribution.

    The token of sample i at position t depends only on row i's distribution and uniforms[i, t], not
    on other rows or on a random generator. Truncated sampling (top-p, top-k) is not supported: the
    sampled KL would ignore the mass that truncation removes, and the policy could exploit that.

    Args:
        model: in evaluation mode.
        request: what to generate; a prompt is processed once for all adjacent rows that have it.
        stop_criteria: when a response ends.
        tokenizer: the model's.
        report: called with (tokens done, T), at least after every 16 tokens.
        at_once: maximum number of responses generated at once; the others wait until one has ended.
            Default: all.
        sampling: the scheme; a value of `rollout.sampling`.
        schedule: the schedule of checks and shapes; default: the device's.
        compiled: compiles the model's layers where that pays off; default: no compilation.
        on_ended: called with each response that has ended.
    """
    device = next(model.parameters()).device
    compiled = compiled or CompiledLayers("never")
    responses = Responses(
        request.to(device), stop_criteria.eos_ids(device), sampling, compiled.distribution
    )
    with (
        model.autocast(device.type),  # casts weights once for the whole rollout
        compiled.used_by(model, device) as shapes,
        transposed_weights([] if shapes is not None else blocks(model.lm), responses.limit),
    ):
        decoder = Decoder(
            model, responses, stop_criteria, schedule or schedule_for(device), report,
            at_once=at_once, compiled=shapes, on_ended=on_ended,
        )  # fmt: skip
        lengths, stopped = decoder.run()
    return responses.rollout(lengths, stopped, tokenizer)
