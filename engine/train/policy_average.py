"""An averaged policy (`train.ema`): an exponential moving average of the weights over the steps.

Source: Polyak and Juditsky 1992 (averaged iterates); the decayed form is that of Morales-Brotons et
al. 2024, arXiv 2411.18704, and of OpenRLHF's `--enable_ema`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from engine.config.sections.train import EMAConfig
from engine.train.checkpoints.host_copy import shard_like
from engine.train.checkpoints.policy_folder import policy_tensors
from engine.train.models.language_model import LanguageModel


class PolicyAverage:
    """The average of a policy's trained weights, in their dtype (float32) and sharded like them.

    With LoRA it has the adapters only. The value function is not part of it.
    """

    def __init__(self, policy: LanguageModel, config: EMAConfig) -> None:
        """Starts from the policy as it is.

        Args:
            policy: on its device, sharded if it is going to be.
            config: with a `decay`.
        """
        if config.decay is None:
            raise TypeError("an average needs a decay")
        self._weight = 1 - config.decay
        self._device = torch.device("cpu") if config.offload else None
        self._tensors = {
            name: tensor.detach().to(self._device or tensor.device, copy=True)
            for name, tensor in _local_tensors(policy).items()
        }

    @torch.no_grad()
    def update(self, policy: LanguageModel) -> None:
        """Average ← decay·average + (1 − decay)·policy, weight by weight."""
        for name, tensor in _local_tensors(policy).items():
            average = self._tensors[name]
            new = tensor.to(average.device)
            if average.is_floating_point():
                average.lerp_(new, self._weight)
            else:  # a buffer
                average.copy_(new)

    @contextmanager
    def in_place_of(self, policy: LanguageModel) -> Iterator[None]:
        """Context in which the policy computes with the average; restores it bit for bit.

        The weights are exchanged one by one, so it takes the memory of the largest. Nothing may
        train inside. All ranks must enter and leave the context.
        """
        self._exchange(policy)
        try:
            yield
        finally:
            self._exchange(policy)

    @torch.no_grad()
    def _exchange(self, policy: LanguageModel) -> None:
        for unit in policy.modules():  # gathered weights would outlive the exchange
            if isinstance(unit, FSDPModule):
                unit.reshard()
        for name, tensor in _local_tensors(policy).items():
            own = tensor.clone()
            tensor.copy_(self._tensors[name])
            self._tensors[name].copy_(own)

    def tensors(self, policy: LanguageModel) -> dict[str, Tensor]:
        """The average by the names of :func:`policy_tensors`; not copied.

        As DTensors where the policy, which they are the average of, is sharded.
        """
        return {n: shard_like(t, self._tensors[n]) for n, t in policy_tensors(policy).items()}


def _local_tensors(policy: LanguageModel) -> dict[str, Tensor]:
    """The policy's weights, of a sharded one this rank's shards; they share its memory."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in policy_tensors(policy).items()
    }
