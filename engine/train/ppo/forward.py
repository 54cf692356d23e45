"""Computes log-probabilities and values of a rollout by full forward passes without a cache."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config.schema import RunConfig
from engine.progress import ReportProgress, report_nothing
from engine.train.distributed.sharding import with_materialised_model
from engine.train.models.language_model import AnyModel
from engine.train.models.output_layer import OutputLayer
from engine.train.ppo.chunked_loss import (
    ChunkedLoss,
    LossOfTokens,
    chunked_logprobs,
    most_logits,
)
from engine.train.ppo.logprobs import token_logprobs, token_logprobs_and_entropies
from engine.train.ppo.masked import response_mask
from engine.train.rollout.rollout import Rollout


@dataclass(frozen=True)
class TokenOutputs:
    """Outputs of one forward pass for the response tokens of n rows; (n, t') float32 each.

    They are 0 beyond a response's length.
    """

    logprobs: Tensor
    """log π at the temperature; zeros with `want="values"`."""
    values: Tensor | None
    """None without a value function."""
    entropies: Tensor | None
    """Entropies of the distributions at the temperature, in nats; None if not requested."""
    loss: tuple[Tensor, Tensor] | None = None
    """The loss and its sums, if computed together with the logits; `logprobs` are then zeros."""
    router_loss: Tensor | None = None
    """The load-balancing loss of experts, a scalar with gradient; None if not requested."""

    @property
    def width(self) -> int:
        """t', the length of the longest response."""
        return self.logprobs.shape[1]


LossOfRows = Callable[[Tensor | None, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A :data:`LossOfTokens` that is called with indices of the chunk's tokens in (n, t'), (c,) int64;
or with None and tensors of (n, t')."""


@dataclass(frozen=True)
class RealTokens:
    """Converts between (n, t') and the N response tokens alone, without what pads shorter ones."""

    index: Tensor
    """Their indices in n·t', ascending; (N,) int64."""
    rows: int
    width: int

    def pack(self, x: Tensor) -> Tensor:
        """Selects them: (n, t') → (N,)."""
        return x.flatten().index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """Puts N numbers at their places: (n, t'), 0 elsewhere."""
        padded = x.new_zeros(self.rows * self.width)
        return padded.index_copy(0, self.index, x.flatten()).view(self.rows, self.width)

    def packed_loss(self, loss: LossOfRows) -> LossOfTokens:
        """Returns the same loss as a function of the N tokens."""

        def of_tokens(
            part: slice | None, logprobs: Tensor, entropies: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            if part is not None:
                return loss(self.index[part], logprobs, entropies)
            padded = None if entropies is None else self.unpack(entropies)
            return loss(None, self.unpack(logprobs), padded)

        return of_tokens


@dataclass(frozen=True)
class HiddenStateReader:
    """Computes log-probabilities or a loss of response tokens from hidden states, in chunks."""

    responses: Tensor
    """(1, N) int64."""
    temperature: float
    entropies: bool
    loss: LossOfTokens | None
    separable: bool

    def wants(self, logits: int) -> bool:
        """Whether there are many logits, and they are not differentiated or only for a loss."""
        known = self.loss is not None or not torch.is_grad_enabled()
        return known and logits > most_logits(self.responses.device)

    def __call__(self, output: OutputLayer, hidden: Tensor) -> tuple[Tensor, ...]:
        """Returns log-probabilities and, if requested, entropies; or the loss and its sums."""
        if self.loss is None:
            return chunked_logprobs(
                output, hidden, self.responses, self.temperature, entropies=self.entropies
            )
        return ChunkedLoss(
            self.loss, self.separable, self.responses, self.temperature, self.entropies
        )(output, hidden)


def rollout_forward(
    model: AnyModel | nn.Module,
    rollout: Rollout,
    rows: Tensor,
    temperature: float,
    *,
    want: str = "both",
    detach_trunk: bool = False,
    entropies: bool = False,
    loss: LossOfRows | None = None,
    separable: bool = True,
    balance: bool = False,
) -> TokenOutputs:
    """Computes log-probabilities and values of some rows' response tokens in one forward pass.

    Each row is a prompt and its response, padded at the end. In a causal model no real token
    attends to that padding, so attention needs no mask: one of (n, L, L) would exclude the fastest
    kernels, and would be the largest tensor for responses of thousands of tokens. The logits and
    the value of token t are the outputs at the position before it, so the last token is not part of
    the input. They are not computed for padding, which would take as much of the output layer's
    time as other tokens.

    Args:
        model: the policy, the reference, or the policy wrapped for training.
        rollout: B responses.
        rows: indices into the rollout, on the host; (n,) int64.
        temperature: divides the logits; > 0.
        want: `both`, `logits` or `values`.
        detach_trunk: stop the value's gradient at a trunk shared with the policy.
        entropies: also compute entropies, which costs a pass over the logits.
        loss: the loss to compute from the log-probabilities. It is called instead of returning them
            if there would be more logits than may be in memory at a time.
        separable: see :class:`ChunkedLoss`.
        balance: also compute the routers' loss, over the tokens of the input.
    """
    lengths = rollout.host_lengths[:, rows].sum(0)
    length = int(lengths.max()) - 1
    width = int(rollout.host_lengths[1, rows].max())
    index = response_mask(rollout.host_lengths[1, rows], width).flatten().nonzero().squeeze(1)
    both = torch.cat([rows, index]).to(rollout.ids.device)  # one copy
    rows, real = both[: len(rows)], RealTokens(both[len(rows) :], len(rows), width)
    responses = real.pack(rollout.ids[rows, :width])[None]
    read_at = rollout.positions(rows, width) - 1
    tokens = rollout.sequences(rows, length)
    no_padding = torch.ones_like(tokens)
    starts = torch.arange(0, len(rows) * length, length, device=rows.device)
    read_at = real.pack(read_at + starts[:, None])
    loss_of_tokens = None if loss is None else real.packed_loss(loss)
    read = HiddenStateReader(responses, temperature, entropies, loss_of_tokens, separable)
    options: dict[str, Tensor] = {}
    if balance:
        options["balance"] = response_mask(lengths - 1, length).to(rows.device)
    found, values, router_loss = model(
        tokens, no_padding, read_at, want=want, detach_trunk=detach_trunk, read=read, **options
    )
    values = None if values is None else real.unpack(values)
    nothing = torch.zeros(real.rows, real.width, device=rows.device)
    if found is None or want == "values":
        return TokenOutputs(nothing, values, None)
    if isinstance(found, tuple) and loss is not None:
        return TokenOutputs(nothing, values, None, (found[0], found[1]), router_loss)
    if isinstance(found, tuple):
        logprobs, entropy = found if entropies else (found[0], None)
    elif entropies:
        logprobs, entropy = token_logprobs_and_entropies(found, responses, temperature)
    else:
        logprobs, entropy = token_logprobs(found, responses, temperature), None
    return TokenOutputs(
        real.unpack(logprobs),
        values,
        None if entropy is None else real.unpack(entropy),
        router_loss=router_loss,
    )


@dataclass(frozen=True)
class MicroBatchLimit:
    """How many responses one pass computes (`ppo.micro_batch_size`, `ppo.micro_batch_by`)."""

    size: int
    longest: tuple[int, int] | None = None
    """Tokens of the longest context and response. If given, a micro-batch is limited to the padded
    tokens of `size` such responses, so it can have more responses if they are shorter, in the same
    memory. None: to `size` responses."""

    @classmethod
    def of(cls, config: RunConfig, rollout: Rollout) -> "MicroBatchLimit":
        """Returns the limit for a rollout that all ranks share."""
        if config.ppo.micro_batch_by == "responses":
            return cls(config.ppo.micro_batch_size)
        response = max(config.rollout.max_new_tokens, rollout.ids.shape[1])
        context = max(rollout.batch.ids.shape[1], int(rollout.host_lengths[0].max()))
        return cls(config.ppo.micro_batch_size, (context, response))


def micro_batches(rollout: Rollout, rows: Tensor, limit: MicroBatchLimit) -> list[Tensor]:
    """Splits row indices, on the host, into micro-batches of similar lengths to reduce padding."""
    if not len(rows):
        return []
    rows = longest_first(rollout, rows)
    if limit.longest is None:
        return list(rows.split(limit.size))
    longest_context, longest_response = limit.longest
    most_tokens = limit.size * (longest_context + longest_response)
    most_response_tokens = limit.size * longest_response  # logits are computed for these alone
    counts: list[int] = []
    count = width = responses = 0
    for context, response in rollout.host_lengths[:, rows].T.tolist():
        count += 1
        width, responses = max(width, context + response), responses + response
        if count * width > most_tokens or responses > most_response_tokens:
            counts.append(count - 1)
            count, width, responses = 1, context + response, response
    return list(rows.split([*counts, count]))


def longest_first(rollout: Rollout, rows: Tensor) -> Tensor:
    """Sorts row indices, on the host, by the length of context and response, descending."""
    lengths = rollout.host_lengths[:, rows].sum(0)
    return rows[lengths.argsort(descending=True, stable=True)]


@torch.no_grad()
@with_materialised_model
def score_tokens(
    model: AnyModel,
    rollout: Rollout,
    temperature: float,
    limit: MicroBatchLimit,
    *,
    rows: Tensor | None = None,
    want: str = "both",
    report: ReportProgress = report_nothing,
) -> tuple[Tensor, Tensor]:
    """Computes log π and V of a rollout's tokens under a model, without gradients.

    Args:
        model: the policy or the reference.
        rollout: B responses of at most T tokens.
        temperature: divides the logits; > 0.
        limit: of a micro-batch.
        rows: indices of the rows to compute, (n,) int64 on the host; default: all.
        want: `both`, `logits` or `values`.
        report: called with (rows done, rows).

    Returns:
        log π and V, each (B, T) float32; 0 beyond a response's length and in other rows.
    """
    logprobs, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    rows = rollout.rows if rows is None else rows
    done = 0
    with model.autocast(logprobs.device.type):  # casts weights once for all micro-batches
        for micro in micro_batches(rollout, rows, limit):
            outputs = rollout_forward(model, rollout, micro, temperature, want=want)
            there = micro.to(logprobs.device)
            logprobs[there, : outputs.width] = outputs.logprobs
            if outputs.values is not None:
                values[there, : outputs.width] = outputs.values
            done += len(micro)
            report(done, len(rows))
    mask = rollout.mask
    return logprobs * mask, values * mask
