"""Sends weights to the engines (`rollout.transfer`): by a file, CUDA IPC, or a broadcast.

Rank 0 creates an update and passes it whole tensors one by one, in inventory order. Problems are
only raised at the end, because until then the other ranks gather tensors together with rank 0. Each
engine is checked separately; a lost engine does not keep the others from loading.
"""

import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from engine.errors import RlhfError
from engine.launch.environment import ALLOCATOR, OLD_ALLOCATOR
from engine.protocol.rollout.messages import Checksum, LoadWeights, TensorInfo
from engine.train.rollout.vllm.client import EngineLostError, RolloutClient, raise_first
from engine.train.rollout.vllm.group import WeightsGroup
from engine.train.rollout.vllm.process.received_weights import DEVICE_OF_HANDLE, gpu_uuid
from engine.train.rollout.vllm.weights import WeightsFile

STORAGE_CLASS, COUNTER = 4, slice(11, 13)
"""Indices of the storage class and its reference counter in the arguments of torch's
`rebuild_cuda_tensor`."""
COUNTERS_START, COUNTER_SIZE = 64, 8
"""Bytes before the first counter in torch's shared memory, and per counter (`MapAllocator.cpp`)."""

MEETING_INTERVAL = 0.1
"""Seconds between checks that an engine still runs while waiting for its workers."""


class Update(Protocol):
    """One update of the engines' weights."""

    def take(self, tensor: Tensor) -> Tensor:
        """Sends the next tensor; returns it as sent, in the engine's dtype."""

    def finish(self, checksum: Checksum) -> LoadWeights:
        """Makes the engines replace their weights; returns the message that was sent.

        Raises:
            EngineLostError: an engine does not hold the weights. The clients of those that do have
                them in `held`.
        """

    def close(self) -> None:
        """Releases resources that the engines no longer need."""


class FileUpdate:
    """Updates through a file in shared memory or on a disk, which all engines read.

    A replacement engine can read the same weights from it.
    """

    def __init__(
        self,
        clients: Sequence[RolloutClient],
        version: int,
        tensors: list[TensorInfo],
        dtype: torch.dtype,
        path: Path,
    ) -> None:
        """Opens the file."""
        self._clients, self._version, self._tensors = clients, version, tensors
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
        _load_together(self._clients, update)
        return update

    def close(self) -> None:
        """Removes the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


class IpcUpdate:
    """Updates through CUDA IPC handles, on a GPU that the engine shares with rank 0.

    All tensors stay allocated until the engine has copied them. Tensors in expandable segments,
    which the ranks use, are copied out of them first: handles of such segments are opened by
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
        # Kernels that write them may still run; the engine reads in another stream.
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
        # torch keeps exported memory until the reader releases it, which a dead reader never does.
        for handle in self._exported:
            storage, counter, offset = handle[STORAGE_CLASS], *handle[COUNTER]
            if readers(counter, offset):
                storage._release_ipc_counter(counter, offset, device=handle[DEVICE_OF_HANDLE])
        self._exported = []
        self._kept.clear()
        torch.cuda.ipc_collect()


def readers(counter: bytes, offset: int) -> int:
    """Reads torch's counter of processes that have not released an exported tensor.

    The counters are unsigned (`torch/csrc/CudaIPCTypes.h`): releasing once too often keeps the
    memory forever. If the counters are gone, everything was released: 0.

    Args:
        counter: the name of a POSIX shared memory object that holds counters.
        offset: the index of the counter.
    """
    shared = Path("/dev/shm", counter.decode().lstrip("/"))  # noqa: S108 - shared memory's own place
    try:
        with shared.open("rb") as file:
            file.seek(COUNTERS_START + COUNTER_SIZE * offset)
            return int.from_bytes(file.read(COUNTER_SIZE), sys.byteorder)
    except FileNotFoundError:
        return 0


@contextmanager
def without_expandable_segments() -> Iterator[bool]:
    """Context manager in which torch allocates GPU memory with handles any process can open.

    Yields whether the allocator's settings had to be changed.
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
    """Updates by a broadcast to the engines' workers, which load each tensor as it arrives.

    Each engine has its own group with rank 0, so that a lost engine only breaks its own group.
    """

    def __init__(
        self,
        clients: Sequence[RolloutClient],
        version: int,
        tensors: list[TensorInfo],
        dtype: torch.dtype,
        *,
        rendezvous: Path,
        workers: int,
        device: torch.device,
    ) -> None:
        """Makes the workers wait for the tensors; creates groups with the workers of new engines.

        Args:
            clients: of the engines.
            version: of the weights.
            tensors: their inventory.
            dtype: of the engines.
            rendezvous: path of a new file where new groups meet; each group appends its engine's
                number.
            workers: of each engine.
            device: rank 0's.
        """
        self._clients, self._dtype, self._device = clients, dtype, device
        self._problems: dict[RolloutClient, Exception] = {}
        self._update = LoadWeights(
            weights_version=version, path="", tensors=tensors, checksum=None, transfer="broadcast"
        )
        for i, client in enumerate(clients):
            path = "" if client.group is not None else f"{rendezvous}-{i}"
            try:
                client.begin_load(replace(self._update, path=path))
                if client.group is None:
                    client.group = _meet(client, path, workers, device)
            except (EngineLostError, RuntimeError) as error:
                self._problems[client] = error

    def take(self, tensor: Tensor) -> Tensor:
        """Broadcasts the tensor."""
        sent = tensor.detach().to(self._device, self._dtype).contiguous()
        for client in self._clients:
            if client not in self._problems and client.group is not None:
                try:
                    client.group.broadcast(sent)
                except RuntimeError as error:
                    self._problems[client] = error
        return sent

    def finish(self, checksum: Checksum) -> LoadWeights:
        """Compares the engines' checksums with that of what was sent."""
        errors: list[Exception] = []
        for client in self._clients:
            problem = self._problems.get(client)
            if problem is None:
                errors += _attempt(partial(client.finish_load, self._update, checksum))
            elif isinstance(problem, EngineLostError):
                errors.append(problem)
            else:
                errors.append(client.lost(f"the weights could not be broadcast: {problem}"))
        raise_first(errors)
        return self._update

    def close(self) -> None:
        """Does nothing: nothing is kept."""


def _load_together(clients: Sequence[RolloutClient], update: LoadWeights) -> None:
    """Makes engines load an update concurrently. Raises EngineLostError if one fails."""
    errors: list[Exception] = []
    begun: list[RolloutClient] = []
    for client in clients:
        problems = _attempt(partial(client.begin_load, update))
        errors += problems
        begun += [] if problems else [client]
    for client in begun:
        errors += _attempt(partial(client.finish_load, update, update.checksum))
    raise_first(errors)


def _attempt(act: Callable[[], None]) -> list[Exception]:
    """Catches an engine's error, so that the others can be handled in any case."""
    try:
        act()
    except (EngineLostError, RlhfError) as error:
        return [error]
    return []


def _meet(client: RolloutClient, path: str, workers: int, device: torch.device) -> WeightsGroup:
    """Meets an engine's workers, but does not wait for an engine that has ended.

    Otherwise the timeouts of this group and of the other engines' groups would expire.

    Raises:
        RuntimeError: the workers have not joined.
    """
    found: list[WeightsGroup] = []
    errors: list[Exception] = []

    def meet() -> None:
        try:
            found.append(WeightsGroup(path, 0, workers + 1, device))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=meet, name="meet workers", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(MEETING_INTERVAL)
        if not found and client.has_replied_or_ended():
            raise RuntimeError("the engine has ended")
    if errors:
        raise errors[0]
    return found[0]
