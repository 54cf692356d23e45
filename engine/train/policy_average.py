"""Maintains an averaged policy (`train.ema`): an exponential moving average of the weights.

Source: Polyak and Juditsky 1992 (averaged iterates); the decayed form is that of Morales-Brotons et
al. 2024, arXiv 2411.18704, and of OpenRLHF's `--enable_ema`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from engine.config.sections.train import EMAConfig
from engine.train.checkpoints.host_copy import shard_like
from engine.train.checkpoints.policy_folder import policy_tensors
from engine.train.distributed.sharding import local_tensor
from engine.train.models.language_model import LanguageModel


class PolicyAverage:
    """The average of a policy's trained weights, in the same dtype (float32) and sharded alike.

    With LoRA it contains only the adapters. The value function is not averaged.
    """

    def __init__(self, policy: LanguageModel, config: EMAConfig) -> None:
        """Starts from the policy as it is.

        Args:
            policy: the policy, on its device and, if it is to be sharded, already sharded.
            config: the configuration, with `decay` set.
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
        """Updates the average to decay·average + (1 − decay)·policy."""
        for name, tensor in _local_tensors(policy).items():
            average = self._tensors[name]
            new = tensor.to(average.device)
            if average.is_floating_point():
                average.lerp_(new, self._weight)
            else:  # a buffer
                average.copy_(new)

    @contextmanager
    def in_place_of(self, policy: LanguageModel) -> Iterator[None]:
        """Context manager in which the policy uses the averaged weights; restores its own exactly.

        Weights are swapped one by one, so this needs extra memory only for the largest one. Do not
        train inside the context. All ranks must enter and leave it.
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
        """Returns the average by the names of :func:`policy_tensors`, without copying.

        The tensors are DTensors where the policy is sharded.
        """
        return {n: shard_like(t, self._tensors[n]) for n, t in policy_tensors(policy).items()}


def _local_tensors(policy: LanguageModel) -> dict[str, Tensor]:
    """Returns the policy's weights, or this rank's shards of them, without copying."""
    return {name: local_tensor(tensor) for name, tensor in policy_tensors(policy).items()}
