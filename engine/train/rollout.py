"""Generation, and the log-probabilities of what was generated."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from engine.train.data import PromptBatch
from engine.train.logprobs import token_logprobs
from engine.train.models import AnyModel
from engine.train.parallel import Team
from engine.train.ppo import response_mask
from engine.train.sharding import with_model_at_hand

Report = Callable[[int, int], None]
"""Takes (done, total)."""


@dataclass
class Rollout:
    """A step's answers; B responses of at most T tokens, right-padded. Not sharded: all of it."""

    batch: PromptBatch
    ids: Tensor
    """(B, T) int64, 0 beyond the length."""
    lengths: Tensor
    """(B,) int64, at least 1; the end-of-sequence token counts."""
    eos: Tensor
    """(B,) bool: the last token is an end of sequence."""
    ended: Tensor
    """(B,) bool: by eos or a stop string, rather than cut off."""
    logprobs: Tensor
    """(B, T) float32: log π_old of the sampled tokens, at the rollout's temperature."""
    entropies: Tensor
    """(B, T) float32: entropy of the whole distribution, nats."""
    values: Tensor
    """(B, T) float32: V before each token; zeros without a value function."""
    texts: list[str]
    """The answers, special tokens left out."""

    @property
    def rows(self) -> Tensor:
        """(B,) int64: every row's number."""
        return torch.arange(len(self.ids), device=self.ids.device)

    @property
    def mask(self) -> Tensor:
        """(B, T) bool."""
        return response_mask(self.lengths, self.ids.shape[1])

    def select(self, rows: Tensor) -> "Rollout":
        """Some of the answers; the widths stay."""
        return Rollout(
            batch=self.batch.select(rows),
            ids=self.ids[rows],
            lengths=self.lengths[rows],
            eos=self.eos[rows],
            ended=self.ended[rows],
            logprobs=self.logprobs[rows],
            entropies=self.entropies[rows],
            values=self.values[rows],
            texts=[self.texts[i] for i in rows.tolist()],
        )


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
    cache = DynamicCache(config=model.lm.config)
    tokens = batch.ids[::per_prompt]
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
    return _rollout(batch, ids, lengths, eos, ended, floats, tokenizer)


def _rollout(
    batch: PromptBatch,
    ids: Tensor,
    lengths: Tensor,
    eos: Tensor,
    ended: Tensor,
    floats: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """Trims to the longest answer and reads the tokens as text; floats is (3, B, limit)."""
    width = int(lengths.max())
    texts = [
        str(tokenizer.decode(row[:n], skip_special_tokens=True))
        for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)
    ]
    logprobs, entropies, values = floats[:, :, :width].unbind(0)
    return Rollout(batch, ids[:, :width], lengths, eos, ended, logprobs, entropies, values, texts)


def merge_rollouts(
    team: Team,
    batch: PromptBatch,
    part: Rollout,
    own: Tensor,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Rollout:
    """The whole batch's answers on every rank, from what each rank wrote.

    Args:
        team: the ranks.
        batch: all B prompts.
        part: this rank's answers.
        own: their rows in the batch; (n,) int64.
        limit: of new tokens.
        tokenizer: the model's.
    """
    if team.size == 1:
        return part

    def spread(x: Tensor, *shape: int) -> Tensor:
        whole = torch.zeros(*shape, dtype=x.dtype, device=x.device)
        if x.dim() == 1:
            whole[own] = x
        else:
            whole[own, : x.shape[1]] = x
        return team.merge(whole)

    count = len(batch.prompts)
    floats = [spread(x, count, limit) for x in (part.logprobs, part.entropies, part.values)]
    lengths, eos, ended = (spread(x, count) for x in (part.lengths, part.eos, part.ended))
    ids = spread(part.ids, count, limit)
    return _rollout(
        batch.to(part.ids.device), ids, lengths, eos, ended, torch.stack(floats), tokenizer
    )


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


def left_mask(lengths: Tensor, width: int) -> Tensor:
    """(B, width) int64 attention mask of left-padded prompts."""
    return (torch.arange(width, device=lengths.device)[None, :] >= width - lengths[:, None]).long()


def rollout_forward(
    model: AnyModel | nn.Module,
    rollout: Rollout,
    rows: Tensor,
    temperature: float,
    *,
    want: str = "both",
    detach_trunk: bool = False,
) -> tuple[Tensor, Tensor | None, int]:
    """Log-probabilities and values of some answers' tokens by one full forward pass.

    The rows are trimmed to their longest prompt and answer. Logits and value of token t come from
    position t − 1, so the last token is not fed at all.

    Returns:
        log π (n, t') float32 at the temperature (zeros if only values are wanted), values (n, t')
        float32 (None without a value function), and t'.
    """
    prompt_lengths, lengths = rollout.batch.lengths[rows], rollout.lengths[rows]
    prompt_width, width = int(prompt_lengths.max()), int(lengths.max())
    prompts = rollout.batch.ids[rows, rollout.batch.ids.shape[1] - prompt_width :]
    answers = rollout.ids[rows, :width]
    tokens = torch.cat([prompts, answers], 1)[:, :-1]
    attention = torch.cat(
        [left_mask(prompt_lengths, prompt_width), response_mask(lengths, width).long()], 1
    )[:, :-1]
    logits, values = model(tokens, attention, width, want=want, detach_trunk=detach_trunk)
    if logits is None or want == "values":
        return torch.zeros(answers.shape, device=answers.device), values, width
    return token_logprobs(logits, answers, temperature), values, width


def by_length(rollout: Rollout, rows: Tensor, size: int) -> list[Tensor]:
    """Row numbers in micro-batches of `size`, like lengths together, so that little is padding."""
    return list(longest_first(rollout, rows).split(size)) if len(rows) else []


def longest_first(rollout: Rollout, rows: Tensor) -> Tensor:
    """Row numbers in order of length: by answer, then by prompt."""
    prompts = rollout.batch.lengths[rows]
    order = rollout.lengths[rows] * (prompts.max() + 1) + prompts
    return rows[order.argsort(descending=True, stable=True)]


@torch.no_grad()
@with_model_at_hand
def score_tokens(
    model: AnyModel,
    rollout: Rollout,
    temperature: float,
    size: int,
    *,
    rows: Tensor | None = None,
    want: str = "both",
    report: Report = lambda _done, _total: None,
) -> tuple[Tensor, Tensor]:
    """Log π and V of a rollout under a model; each (B, T) float32, 0 beyond the length.

    Where only some `rows` are asked for the others' are 0.
    """
    logprobs, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    asked = rollout.rows if rows is None else rows
    done = 0
    for micro in by_length(rollout, asked, size):
        got, value, width = rollout_forward(model, rollout, micro, temperature, want=want)
        logprobs[micro, :width] = got
        if value is not None:
            values[micro, :width] = value
        done += len(micro)
        report(done, len(asked))
    mask = rollout.mask
    return logprobs * mask, values * mask
