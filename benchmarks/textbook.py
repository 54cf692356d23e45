"""Plain implementations of the engine's optimised functions, for :mod:`benchmarks.learning`.

Each has the name, the arguments and the results of the function that it replaces. They are slower
and use more memory.
"""

from typing import Any

import torch
from torch import Tensor

from engine.train.ppo import forward
from engine.train.ppo.forward import MicroBatchLimit, TokenOutputs, score_tokens
from engine.train.ppo.masked import response_mask
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import Rollout, assemble, left_mask
from engine.train.rollout.sampling import sample
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.run import Run


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probabilities by way of the full log-softmax."""
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    return logprobs.gather(2, tokens[:, :, None]).squeeze(2)


def longest_first(_rollout: Rollout, rows: Tensor) -> Tensor:
    """Leaves the rows in their order."""
    return rows


def rollout_forward(
    model: Any,
    rollout: Rollout,
    rows: Tensor,
    temperature: float,
    *,
    want: str = "both",
    detach_trunk: bool = False,
    entropies: bool = False,
    **_of_chunks: Any,
) -> TokenOutputs:
    """Pads all rows to the batch's longest and computes logits at the prompt positions too."""
    if entropies:
        raise ValueError("there is no plain version with entropies")
    prompts, responses = rollout.batch.ids[rows], rollout.ids[rows]
    width = responses.shape[1]
    tokens = torch.cat([prompts, responses], 1)
    attention = torch.cat(
        [
            left_mask(rollout.batch.lengths[rows], prompts.shape[1]),
            response_mask(rollout.lengths[rows], width).long(),
        ],
        1,
    )
    logits, values, _ = model(
        tokens, attention, tokens.shape[1], want=want, detach_trunk=detach_trunk
    )
    longest = int(rollout.lengths[rows].max())  # of these rows; the loss expects no more
    if values is not None:
        values = values[:, -width - 1 : -1][:, :longest]
    if logits is None or want == "values":
        return TokenOutputs(torch.zeros(len(rows), longest), values, None)
    # By way of the module, where a benchmark may have put another one.
    logprobs = forward.token_logprobs(logits[:, -width - 1 : -1], responses, temperature)  # type: ignore[attr-defined]  # imported there
    return TokenOutputs(logprobs[:, :longest], values, None)


def old_policy_outputs(
    run: Run, rollout: Rollout, rows: Tensor, _report: Any = None
) -> tuple[Tensor, Tensor]:
    """Computes log π_old and V_old in a separate forward pass."""
    size, temperature = run.config.ppo.micro_batch_size, run.config.rollout.temperature
    return score_tokens(run.policy, rollout, temperature, MicroBatchLimit(size), rows=rows)


@torch.no_grad()
def generate(
    model: Any,
    request: RolloutRequest,
    stop_criteria: StopCriteria,
    tokenizer: Any,
    *_report: Any,
    sampling: str = "gumbel",
    **_of_schedule: Any,
) -> Rollout:
    """Generates without a cache; every row is computed until the last response has ended."""
    batch, uniforms, temperature = request.batch, request.uniforms, request.temperature
    count, limit = uniforms.shape
    ids = torch.zeros(count, limit, dtype=torch.int64)
    floats = torch.zeros(3, count, limit)
    lengths = torch.full((count,), limit, dtype=torch.int64)
    eos, ended = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    tokens = batch.ids
    attention = left_mask(batch.lengths, tokens.shape[1])
    for t in range(limit):
        logits, values, _ = model(tokens, attention, 1)
        token, logprob, entropy = sample(logits[:, 0], uniforms[:, t], temperature, sampling)
        ids[:, t], floats[0, :, t], floats[1, :, t] = token, logprob, entropy
        if values is not None:
            floats[2, :, t] = values[:, 0]
        is_eos = torch.isin(token, stop_criteria.eos_ids(token.device))
        stops = [stop_criteria.stops_at(row, t) is not None for row in ids[:, : t + 1].tolist()]
        over = ~ended & (is_eos | torch.tensor(stops))
        lengths[over], eos[over] = t + 1, is_eos[over]
        ended |= over
        if ended.all():
            break
        tokens = torch.cat([tokens, token[:, None]], 1)
        attention = torch.cat([attention, attention.new_ones(count, 1)], 1)
    beyond = ~response_mask(lengths, limit)
    ids[beyond] = 0
    floats[:, beyond] = 0
    return assemble(batch, ids, lengths, eos, ended, floats, tokenizer)


def no_op(*_args: Any, **_named: Any) -> None:
    """Does nothing; replaces a function that only makes something faster."""


def always_false(*_args: Any) -> bool:
    """Returns False; replaces a check that enables an optimisation."""
    return False
