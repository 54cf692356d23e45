"""Selects the responses of a step that are written to the journal."""

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.config.schema import LogConfig
from engine.protocol.rank_messages import Sample, TokenArrays
from engine.train.ppo import masked
from engine.train.ppo.advantages import Targets
from engine.train.rollout.rollout import Rollout


def kept_samples(
    log: LogConfig,
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    scores: Tensor,
    parts: dict[str, list[float | None]],
    targets: Targets,
    ref_logprobs: Tensor,
) -> list[Sample]:
    """The first `log.samples` responses of the batch, the first `log.arrays` with per-token arrays.

    Args:
        log: the configuration section with both numbers.
        tokenizer: the policy's tokenizer.
        rollout: B responses of at most T tokens.
        scores: (B,), the scores used for training.
        parts: B scores for each reward source.
        targets: the old log-probabilities, values and advantages.
        ref_logprobs: (B, T), log-probabilities under the reference.
    """
    kl = masked.sequence_kl(targets.old_logprobs, ref_logprobs, rollout.mask).tolist()
    kept = []
    for i in range(min(log.samples, len(scores))):
        arrays = None
        if i < log.arrays:
            arrays = _token_arrays(tokenizer, rollout, targets, ref_logprobs, i)
        kept.append(
            Sample(
                index=i,
                prompt=rollout.batch.prompts[i].text,
                response=rollout.texts[i],
                score=float(scores[i]),
                kl=kl[i],
                length=int(rollout.lengths[i]),
                ended=bool(rollout.ended[i]),
                parts={k: v[i] for k, v in parts.items()},
                arrays=arrays,
            )
        )
    return kept


def _token_arrays(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    targets: Targets,
    ref_logprobs: Tensor,
    i: int,
) -> TokenArrays:
    n = int(rollout.lengths[i])
    ids = rollout.ids[i, :n].tolist()
    return TokenArrays(
        tokens=[str(tokenizer.decode([t])) for t in ids],
        token_ids=ids,
        logprob=targets.old_logprobs[i, :n].tolist(),
        ref_logprob=ref_logprobs[i, :n].tolist(),
        advantage=targets.advantages[i, :n].tolist(),
        value=[] if targets.old_values is None else targets.old_values[i, :n].tolist(),
    )
