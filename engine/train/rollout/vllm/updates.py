"""How the weights reach the engine (`rollout.transfer`): a file, CUDA IPC, or a broadcast.

Rank 0 makes an update and gives it the tensors one after the other, whole, in the order of their
inventory. A problem shows at the end only: until then the other ranks gather tensors with rank 0.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from engine.launch.environment import ALLOCATOR, OLD_ALLOCATOR
from engine.protocol.rollout_messages import Checksum, LoadWeights, TensorInfo
from engine.train.rollout.vllm.client import EngineLostError, RolloutClient
from engine.train.rollout.vllm.group import WeightsGroup
from engine.train.rollout.vllm.received_weights import DEVICE_OF_HANDLE, gpu_uuid
from engine.train.rollout.vllm.weights import WeightsFile

STORAGE_CLASS, COUNTER = 4, slice(11, 13)
"""Where the class of a storage and its count of readers stand among the arguments of torch's
`rebuild_cuda_tensor`."""


class Update(Protocol):
    """One update of the engine's weights."""

    def take(self, tensor: Tensor) -> Tensor:
        """Sends the next tensor; returns it as it is sent, in the dtype of the engine."""

    def finish(self, checksum: Checksum) -> LoadWeights:
        """Has the engine replace its weights; returns what it was sent.

        Raises:
            EngineLostError: the engine does not hold the weights.
        """

    def close(self) -> None:
        """Gives up what the engine needs no longer."""


class FileUpdate:
    """By a file in shared memory or on a disk, from which another engine can be given the same."""

    def __init__(
        self,
        client: RolloutClient,
        version: int,
        tensors: list[TensorInfo],
        dtype: torch.dtype,
        path: Path,
    ) -> None:
        """Opens the file."""
        self._client, self._version, self._tensors = client, version, tensors
        self._path = path
        self._file = WeightsFile(path, tensors, dtype)

    def take(self, tensor: Tensor) -> Tensor:
        """Writes the tensor."""
        return self._file.write(tensor)

    def finish(self, checksum: Checksum) -> LoadWeights:
        """Sends the path."""
        self._file.close()
        update = LoadWeights(
            weights_version=self._version, path=str(self._path), tensors=self._tensors,
            checksum=checksum,
        )  # fmt: skip
        self._client.load(update)
        return update

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class IpcUpdate:
    """By handles of memory on the GPU that the engine shares with rank 0.

    All tensors stay allocated until the engine has copied them. They are copies where they would
    otherwise be in expandable segments, which the ranks use: handles of those are opened by
    `pidfd_getfd`, which kernels and containers refuse between processes that are not parent and
    child.
    """

    def __init__(
        self,
        client: RolloutClient,
        version: int,
        tensors: list[TensorInfo],
        dtype: torch.dtype,
    ) -> None:
        """Exports nothing yet."""
        self._client, self._version, self._tensors = client, version, tensors
        self._dtype = dtype
        self._kept: list[Tensor] = []
        self._exported: list[tuple[Any, ...]] = []
        """Handles that the engine may not have released."""

    def take(self, tensor: Tensor) -> Tensor:
        """Keeps the tensor, or a copy of it."""
        source = tensor.detach()
        with without_expandable_segments() as changed:
            if changed or source.dtype != self._dtype or not source.is_contiguous():
                sent = torch.empty(source.shape, dtype=self._dtype, device=source.device)
            else:
                sent = source
        if sent is not source:
            sent.copy_(source)
        self._kept.append(sent)
        return sent

    def finish(self, checksum: Checksum) -> LoadWeights:
        """Sends the handles, over the socket whose peer was checked."""
        # Their kernels may still run; the engine reads in another stream.
        torch.cuda.synchronize()
        self._exported = [reduce_tensor(t)[1] for t in self._kept]
        update = LoadWeights(
            weights_version=self._version, path="", tensors=self._tensors, checksum=checksum,
            transfer="ipc", handles=pickle.dumps(self._exported),
            gpu=gpu_uuid(self._kept[0].device),
        )  # fmt: skip
        self._client.load(update)
        self._exported = []
        return update

    def close(self) -> None:
        """Frees the tensors."""
        # torch keeps exported memory until its reader has released it, which a dead one never does.
        for handle in self._exported:
            storage, counter, offset = handle[STORAGE_CLASS], *handle[COUNTER]
            storage._release_ipc_counter(counter, offset, device=handle[DEVICE_OF_HANDLE])
        self._exported = []
        self._kept.clear()
        torch.cuda.ipc_collect()


@contextmanager
def without_expandable_segments() -> Iterator[bool]:
    """Context in which torch allocates GPU memory whose handles every process can open.

    Yields whether the settings had to be changed for that.
    """
    variables = (os.environ.get(name, "") for name in (OLD_ALLOCATOR, ALLOCATOR))
    settings = next(filter(None, variables), "")
    fixed = re.sub(r"(expandable_segments: *)True", r"\1False", settings)
    if fixed == settings:
        yield False
        return
    change = getattr(
        torch._C, "_accelerator_setAllocatorSettings", torch.cuda.memory._set_allocator_settings
    )
    change(fixed)
    try:
        yield True
    finally:
        change(settings)


class BroadcastUpdate:
    """By a broadcast to the engine's workers, which load each tensor as it arrives."""

    def __init__(
        self,
        client: RolloutClient,
        version: int,
        tensors: list[TensorInfo],
        dtype: torch.dtype,
        place: tuple[Path, int, torch.device],
    ) -> None:
        """Has the workers wait for the tensors, and meets them if they are new.

        Args:
            client: of the engine.
            version: of the weights.
            tensors: their inventory.
            dtype: of the engine.
            place: a new file by which a group can meet, the number of workers, and rank 0's device.
        """
        self._client, self._dtype = client, dtype
        path, workers, device = place
        self._device = device
        self._problem = ""
        group = client.group
        self._update = LoadWeights(
            weights_version=version, path="" if group is not None else str(path), tensors=tensors,
            checksum=None, transfer="broadcast",
        )  # fmt: skip
        try:
            client.begin_load(self._update)
            if group is None:
                client.group = WeightsGroup(str(path), 0, workers + 1, device)
        except (EngineLostError, RuntimeError) as error:
            self._problem = str(error)

    def take(self, tensor: Tensor) -> Tensor:
        """Broadcasts the tensor."""
        sent = tensor.detach().to(self._device, self._dtype).contiguous()
        if not self._problem and self._client.group is not None:
            try:
                self._client.group.broadcast(sent)
            except RuntimeError as error:
                self._problem = str(error)
        return sent

    def finish(self, checksum: Checksum) -> LoadWeights:
        """Compares the engine's checksum with that of what was sent."""
        if self._problem:
            self._client.close()
            raise EngineLostError(f"the weights could not be broadcast: {self._problem}")
        self._client.finish_load(self._update, checksum)
        return self._update

    def close(self) -> None:
        """Does nothing: nothing is kept."""
