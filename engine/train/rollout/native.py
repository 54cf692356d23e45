"""Generation with the model that is trained, by full-distribution sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.train.data.prompts import PromptBatch
from engine.train.distributed.sharding import with_materialised_model
from engine.train.models.language_model import AnyModel
from engine.train.rollout.kv_cache import preallocated_cache
from engine.train.rollout.rollout import ReportProgress, Rollout, assemble, left_mask
from engine.train.rollout.sampling import sample
from engine.train.rollout.stop_criteria import StopCriteria


@dataclass(frozen=True)
class NativeBackend:
    """Generates with the model itself, on the device it is placed on; see :func:`generate`."""

    stop_criteria: StopCriteria
    tokenizer: PreTrainedTokenizerBase

    def generate(
        self,
        model: AnyModel,
        batch: PromptBatch,
        uniforms: Tensor,
        temperature: float,
        *,
        per_prompt: int = 1,
        report: ReportProgress = lambda _done, _total: None,
    ) -> Rollout:
        """See :func:`generate`."""
        return generate(
            model, batch, uniforms, temperature, self.stop_criteria, self.tokenizer, report,
            per_prompt=per_prompt,
        )  # fmt: skip


@torch.no_grad()
@with_materialised_model
def generate(
    model: AnyModel,
    batch: PromptBatch,
    uniforms: Tensor,
    temperature: float,
    stop_criteria: StopCriteria,
    tokenizer: PreTrainedTokenizerBase,
    report: ReportProgress = lambda _done, _total: None,
    *,
    per_prompt: int = 1,
) -> Rollout:
    """Samples a response to each prompt from the full distribution.

    The token of sample i at position t is the inverse of row i's cumulative distribution at
    uniforms[i, t], so it depends on no other row and on no generator. Finished rows are dropped
    from the batch. Truncated sampling (top-p, top-k) is not supported: the sampled KL would ignore
    the mass that truncation removes, and the policy could exploit that.

    Args:
        model: in evaluation mode.
        batch: B prompts.
        uniforms: (B, T) float32 in [0, 1); T is the most new tokens.
        temperature: > 0.
        stop_criteria: when a response ends.
        tokenizer: the model's.
        report: called with (tokens done, T) after each token.
        per_prompt: number of adjacent rows with the same prompt; the prompt is processed once for
            all of them.
    """
    device = next(model.parameters()).device
    batch = batch.to(device)
    count, limit = uniforms.shape
    uniforms = uniforms.to(device)
    ids = torch.zeros(count, limit, dtype=torch.int64, device=device)
    floats = torch.zeros(3, count, limit, device=device)
    lengths = torch.full((count,), limit, dtype=torch.int64, device=device)
    eos = torch.zeros(count, dtype=torch.bool, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    rows = torch.arange(count, device=device)  # unfinished
    tokens = batch.ids[::per_prompt]
    cache = preallocated_cache(model.lm.config, tokens.shape[1] + limit)
    attention = left_mask(batch.lengths, tokens.shape[1])
    with model.autocast(device.type):  # casts weights once for the whole rollout
        for t in range(limit):
            mask = attention if t else attention[::per_prompt]
            logits, values = model(tokens, mask, 1, cache=cache)
            if t == 0 and per_prompt > 1:
                cache.batch_repeat_interleave(per_prompt)
                logits = logits.repeat_interleave(per_prompt, 0)
                values = None if values is None else values.repeat_interleave(per_prompt, 0)
            token, logprob, entropy = sample(logits[:, 0], uniforms[rows, t], temperature)
            ids[rows, t] = token
            floats[0, rows, t], floats[1, rows, t] = logprob, entropy
            if values is not None:
                floats[2, rows, t] = values[:, 0]
            is_eos = stop_criteria.is_eos(token)
            finished = is_eos | stop_criteria.stops(ids[rows], t + 1)
            lengths[rows[finished]] = t + 1
            eos[rows] = is_eos
            ended[rows] = finished
            report(t + 1, limit)
            if finished.all():
                break
            tokens = token[:, None]
            attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
            if finished.any():
                keep = (~finished).nonzero().squeeze(1)
                rows, tokens, attention = rows[keep], tokens[keep], attention[keep]
                cache.batch_select_indices(keep)
    return assemble(batch, ids, lengths, eos, ended, floats, tokenizer)
