"""A process group of rank 0 and the engine's workers, used to broadcast weights.

It is separate from the groups of the ranks and of vLLM. Imported by both sides.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__

TIMEOUT = timedelta(minutes=5)
"""Timeout for a broadcast, and for the engine's workers to join."""


class WeightsGroup:
    """Uses NCCL between GPUs and gloo on a CPU. Rank 0 sends, the others receive."""

    def __init__(self, path: str, rank: int, size: int, device: torch.device) -> None:
        """Meets the other members through a file, which opens no port; waits for them.

        Args:
            path: the file. A new one for each group.
            rank: 0 for the trainer, 1 … for the engine's workers.
            size: number of members.
            device: of the tensors.

        Raises:
            RuntimeError: the other members have not joined.
        """
        store = FileStore(path, size)
        self._group: Any  # torch's stubs lack the methods of both
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)
        self.device = device

    def broadcast(self, tensor: Tensor) -> None:
        """Sends a tensor of rank 0, or receives into it; contiguous, on the group's device.

        Raises:
            RuntimeError: a member is gone.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()
