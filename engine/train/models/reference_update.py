"""A reference that follows the policy (`kl.reference_update`).

Source: Gorbatovski et al. 2024, arXiv 2404.09656 (TR-DPO: soft and hard updates of the reference);
`sync_ref_model` in TRL.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.errors import UserInputError
from engine.train.distributed.file_backed import drop_pages
from engine.train.distributed.sharding import full_tensor
from engine.train.models.language_model import AnyModel, LanguageModel


def check_same_shapes(policy: LanguageModel, reference: AnyModel) -> None:
    """Checks that the reference can take the policy's weights. Raises UserInputError."""
    if _shapes(policy) != _shapes(reference):
        raise UserInputError(
            "kl.reference_update needs a reference of the policy's architecture: model.reference "
            "is another model"
        )


def _shapes(model: AnyModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.lm.named_parameters()}


@torch.no_grad()
def mix_into_reference(policy: LanguageModel, reference: AnyModel, mix: float) -> None:
    """π_ref ← mix·π + (1 − mix)·π_ref, weight by weight and in place. All ranks must call it.

    Computed in float32 and rounded to the reference's dtype: in bfloat16 a small `mix` moves few
    weights.
    """
    sources = dict(policy.lm.named_parameters())
    for name, target in reference.lm.named_parameters():
        old, new = _aligned(target, sources[name])
        old.copy_(old.float().lerp(new.to(old.device).float(), mix))
    drop_pages(reference)


def _aligned(target: nn.Parameter, source: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Returns both tensors, or this rank's shards if both are sharded alike."""
    if isinstance(target, DTensor) and isinstance(source, DTensor):
        return target.to_local(), source.to_local()
    return target.data, full_tensor(source.data)
