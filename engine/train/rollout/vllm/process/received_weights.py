"""Receives the tensors of an update in a worker of the engine.

Requires torch and safetensors but not vLLM, since the GPU check also receives weights with it.
"""

import pickle
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from engine.train.rollout.vllm.group import WeightsGroup

Inventory = list[tuple[str, list[int]]]
"""Name and shape of each tensor of an update."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DEVICE_OF_HANDLE = 6
"""Index of `storage_device` in the arguments of torch's `rebuild_cuda_tensor`."""


class IncompleteUpdateError(Exception):
    """An update lacks tensors that the model needs, or the model does not hold what was sent."""


def gpu_uuid(device: torch.device) -> str:
    """Returns an identifier of a GPU that is the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def from_file(path: str, tensors: Inventory) -> Iterator[tuple[str, Tensor]]:
    """Reads the tensors of a safetensors file, on the host.

    Raises:
        IncompleteUpdateError: it does not have the tensors that were announced.
    """
    with safe_open(path, framework="pt") as file:
        check_file(file, tensors)
        for name, _ in tensors:
            yield name, file.get_tensor(name)


def from_ipc(
    handles: bytes, tensors: Inventory, gpu: str, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Maps the tensors that another process holds in the memory of this GPU.

    Each is that process's own memory: it must be copied before the update is reported as loaded.

    Args:
        handles: pickled arguments of `rebuild_cuda_tensor`, in the order of `tensors`. Only from
            a socket whose peer is a process of the same user.
        tensors: name and shape of each tensor.
        gpu: the sender's :func:`gpu_uuid`.
        device: this process's.

    Raises:
        IncompleteUpdateError: the sender has another GPU, or has sent other tensors.
    """
    if gpu != gpu_uuid(device):
        raise IncompleteUpdateError(
            "the rollout engine is on another GPU than rank 0, and rollout.transfer: ipc needs the "
            "same: set rollout.gpus or rollout.transfer"
        )
    exported: list[tuple[Any, ...]] = pickle.loads(handles)  # noqa: S301 - as said above
    if len(exported) != len(tensors):
        raise IncompleteUpdateError(
            f"the update has {len(exported)} tensors instead of the {len(tensors)} announced"
        )
    for (name, shape), arguments in zip(tensors, exported, strict=True):
        tensor = rebuild_cuda_tensor(*on_device(arguments, device.index or 0))
        if list(tensor.shape) != list(shape):
            raise IncompleteUpdateError(
                f"{name} has the shape {list(tensor.shape)} instead of {shape}"
            )
        yield name, tensor


def from_broadcast(
    group: WeightsGroup, tensors: Inventory, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Receives the tensors that rank 0 of the trainer broadcasts, one after the other."""
    for name, shape in tensors:
        tensor = torch.empty(shape, dtype=dtype, device=group.device)
        group.broadcast(tensor)
        yield name, tensor


def on_device(handle: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """Replaces the device index in arguments of `rebuild_cuda_tensor` by this process's own."""
    return (*handle[:DEVICE_OF_HANDLE], index, *handle[DEVICE_OF_HANDLE + 1 :])


def check_file(file: Any, tensors: Inventory) -> None:
    """Checks that a file has the tensors that were announced. Raises IncompleteUpdateError."""
    there = set(file.keys())
    for name, shape in tensors:
        if name not in there:
            raise IncompleteUpdateError(f"the update lacks {name}")
        found = file.get_slice(name).get_shape()
        if list(found) != list(shape):
            raise IncompleteUpdateError(f"{name} has the shape {found} instead of {shape}")
    if extra := there - {name for name, _ in tensors}:
        raise IncompleteUpdateError(f"the update has {min(extra)}, which was not announced")
