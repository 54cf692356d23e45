"""Generation: an answer to each prompt, sampled from the whole distribution."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.train.cache import roomy_cache
from engine.train.data import PromptBatch
from engine.train.models import AnyModel
from engine.train.rollout import Report, Rollout, assemble, left_mask
from engine.train.sharding import with_model_at_hand


class Ending:
    """Tells when an answer is over: an end-of-sequence token, or a stop string in its text."""

    def __init__(self, eos: list[int], stop: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._eos = torch.tensor(eos, dtype=torch.int64)
        self._stop = stop
        self._tokenizer = tokenizer
        # A token carries at least one byte as a rule, so this many hold any stop string.
        self._tail = max((len(s.encode()) for s in stop), default=0) + 4

    def is_eos(self, tokens: Tensor) -> Tensor:
        """(n,) bool for (n,) tokens."""
        return torch.isin(tokens, self._eos.to(tokens.device))

    def stops(self, ids: Tensor, length: int) -> Tensor:
        """(n,) bool: whether a stop string stands at the end of ids[:, :length]."""
        if not self._stop:
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        tails = self._tokenizer.batch_decode(ids[:, max(0, length - self._tail) : length])
        found = [any(s in tail for s in self._stop) for tail in tails]
        return torch.tensor(found, device=ids.device)


@torch.no_grad()
@with_model_at_hand
def generate(
    model: AnyModel,
    batch: PromptBatch,
    uniforms: Tensor,
    temperature: float,
    ending: Ending,
    tokenizer: PreTrainedTokenizerBase,
    report: Report = lambda _done, _total: None,
    *,
    per_prompt: int = 1,
) -> Rollout:
    """Samples an answer to each prompt from the full distribution.

    The token of sample i at position t is the inverse of row i's cumulative distribution at
    uniforms[i, t], so it depends on no other row and no generator; finished rows leave the batch.
    Truncated sampling (top-p, top-k) is not offered: its KL can be gamed.

    Args:
        model: in evaluation mode.
        batch: B prompts.
        uniforms: (B, T) in [0, 1); T is the limit of new tokens.
        temperature: > 0.
        ending: when an answer is over.
        tokenizer: the model's.
        report: called now and then with (tokens done, T).
        per_prompt: so many neighbouring rows have the same prompt, which is then read once for all.
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

    rows = torch.arange(count, device=device)  # those still being written
    tokens = batch.ids[::per_prompt]
    cache = roomy_cache(model.lm.config, tokens.shape[1] + limit)
    attention = left_mask(batch.lengths, tokens.shape[1])
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
        is_eos = ending.is_eos(token)
        over = is_eos | ending.stops(ids[rows], t + 1)
        lengths[rows[over]] = t + 1
        eos[rows] = is_eos
        ended[rows] = over
        report(t + 1, limit)
        if over.all():
            break
        tokens = token[:, None]
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        if over.any():
            keep = (~over).nonzero().squeeze(1)
            rows, tokens, attention = rows[keep], tokens[keep], attention[keep]
            cache.batch_select_indices(keep)
    return assemble(batch, ids, lengths, eos, ended, floats, tokenizer)


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse-transform sampling from each row's full distribution.

    Args:
        logits: (n, V), any dtype.
        uniforms: (n,) in [0, 1).
        temperature: > 0.

    Returns:
        token (n,) int64, its log-probability (n,) and the distribution's entropy (n,), float32.
    """
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = logprobs.exp()
    # A CPU adds in double anyway. A GPU would add in float32, each prefix in another order: over a
    # long tail its sums go up and down by rounding, and tokens of no probability are drawn.
    cumulative = probs.cumsum(-1, dtype=torch.float64 if probs.is_cuda else None)
    # Scaled by the last sum, which rounding leaves a little off 1; right=True skips tokens of
    # probability 0 at u = 0; clamped for u·c that rounds up to c itself.
    at = (uniforms * cumulative[:, -1])[:, None]
    token = torch.searchsorted(cumulative, at, right=True).clamp(max=logits.shape[-1] - 1)
    entropy = -(probs * logprobs.clamp(min=-1e4)).sum(-1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1), entropy
