"""Determines whether a reward model reads padding, and so needs an attention mask.

In a causal decoder no token attends to what follows it, so rows that are padded at the end need no
mask. Without one, attention is computed by faster kernels, which skip what is not attended to.
"""

from typing import Any

import torch

from engine.train.models.shapes import is_classifier_on_decoder
from engine.train.rewards.kinds.encoding import RewardEncoding

LENGTHS = (16, 2, 3, 5)
"""Tokens of the rows that are scored with and without a mask. Most of the first is what the others
would attend to."""
MAX_CHANGE = {torch.float32: 1e-3}
ROUNDED_CHANGE = 0.05
"""Scores without a mask may differ by this much from those with one, in standard deviations of the
scores; the latter with weights of fewer bits. Rounding changes them by less, padding that is read
by about 1."""


@torch.no_grad()
def reads_padding(model: Any, encoding: RewardEncoding, label: int, device: torch.device) -> bool:
    """Whether a classifier's scores would change if it got no mask for padding at the end.

    True without trying if it is not one of transformers' classifiers on a decoder.

    Args:
        model: the classifier, with its weights in place.
        encoding: what it reads.
        label: which logit is the score.
        device: of the model.
    """
    if not is_classifier_on_decoder(model):
        return True
    rows = range(len(LENGTHS))
    encoded = encoding.random_rows(LENGTHS)
    model.config.pad_token_id = encoded.pad_of(rows)
    with_mask, without = (
        model(**encoded.batch(rows, device, mask=mask)).logits[:, label].float()
        for mask in (True, False)
    )
    limit = MAX_CHANGE.get(model.score.weight.dtype, ROUNDED_CHANGE)
    return not (with_mask - without).abs().max() <= limit * with_mask.std()
