"""Selects the responses of a step that are written to the journal."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.config.sections.supervision import LogConfig
from engine.protocol.rank_messages import Sample, TokenArrays
from engine.train.ppo import masked
from engine.train.ppo.advantages import Targets
from engine.train.rewards.mix import Scores
from engine.train.rollout.rollout import Rollout


def kept_samples(
    log: LogConfig,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    scores: Tensor,
    raw: Scores,
    targets: Targets,
    ref_logprobs: Tensor,
) -> list[Sample]:
    """Returns the first `log.samples` responses; the first `log.arrays` with per-token arrays.

    Args:
        log: the configuration section with both numbers.
        tokenizer: the policy's tokenizer.
        rollout: B responses of at most T tokens.
        scores: (B,), normalised and clipped, minus penalties.
        raw: as the reward sources gave them.
        targets: the old log-probabilities, values and advantages.
        ref_logprobs: (B, T), log-probabilities under the reference.
    """
    kl = masked.sequence_kl(targets.old_logprobs, ref_logprobs, rollout.mask)
    scored, kls, ended = torch.stack([scores, kl, rollout.ended.float()]).tolist()
    versions = [None] * len(scores) if rollout.versions is None else rollout.versions.tolist()
    lengths = rollout.host_lengths[1].tolist()
    arrays = _token_arrays(tokenizer, rollout, targets, ref_logprobs, log.arrays)
    return [
        Sample(
            index=i,
            prompt=rollout.batch.prompts[i].text,
            response=rollout.texts[i],
            score=scored[i],
            kl=kls[i],
            length=lengths[i],
            ended=bool(ended[i]),
            parts={k: v[i] for k, v in raw.parts.items()},
            turn_scores=raw.turns_of(i),
            weights_version=versions[i],
            replies=rollout.replies(i),
            messages=rollout.messages(i),
            arrays=arrays[i] if i < len(arrays) else None,
        )
        for i in range(min(log.samples, len(scores)))
    ]


def _token_arrays(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    targets: Targets,
    ref_logprobs: Tensor,
    count: int,
) -> list[TokenArrays]:
    """Returns the per-token arrays of the first `count` responses."""
    columns = [targets.old_logprobs, ref_logprobs, targets.advantages]
    if targets.old_values is not None:
        columns.append(targets.old_values)
    floats = torch.stack([x[:count] for x in columns], 1).tolist()
    lengths = rollout.host_lengths[1].tolist()
    kept = []
    turns = rollout.conversation.turns if rollout.conversation is not None else None
    of_rows = zip(rollout.ids[:count].tolist(), lengths, floats, strict=False)
    for i, (ids, n, rows) in enumerate(of_rows):
        logprob, ref_logprob, advantage, *value = (row[:n] for row in rows)
        kept.append(
            TokenArrays(
                tokens=[str(tokenizer.decode([t])) for t in ids[:n]],
                token_ids=ids[:n],
                logprob=logprob,
                ref_logprob=ref_logprob,
                advantage=advantage,
                value=value[0] if value else [],
                before_replies=turns[i].before_replies if turns is not None else [],
            )
        )
    return kept
