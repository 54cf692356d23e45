"""Writes the policy's weights for the rollout engine, one tensor at a time.

The file is a safetensors file in shared memory (/dev/shm), or on a disk if that is too small. It is
not written by the `safetensors` package, whose writer needs all tensors at once: a sharded policy
is gathered one tensor at a time.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserInputError
from engine.progress import ReportProgress, report_nothing
from engine.protocol.rollout.messages import Checksum, TensorInfo
from engine.train.models.adapters.lora import mergeable_weights, merged_weight
from engine.train.rollout.vllm.checksum import MASK, checksum

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in a safetensors header."""


def inventory(lm: nn.Module, dtype: torch.dtype) -> list[TensorInfo]:
    """Lists the tensors of an update, in order. Gathers nothing."""
    found, seen = [], set()
    for name, (weight, _) in mergeable_weights(lm).items():
        found.append(TensorInfo(name, list(weight.shape), DTYPES[dtype], tied=id(weight) in seen))
        seen.add(id(weight))
    return found


def file_size(lm: nn.Module, dtype: torch.dtype) -> int:
    """Returns the size in bytes of a :class:`WeightsFile` with all weights. Gathers nothing."""
    tensors = inventory(lm, dtype)
    return len(header(tensors, dtype.itemsize)) + dtype.itemsize * sum(map(_elements, tensors))


def folder_with_room(folders: list[Path], size: int) -> Path:
    """Returns the first folder with `size` bytes free on its file system.

    Raises:
        UserInputError: there is none.
    """
    free = [shutil.disk_usage(folder).free for folder in folders]
    for folder, there in zip(folders, free, strict=True):
        if there >= size:
            return folder
    found = " and ".join(
        f"{there / 1e9:.3g} GB in {folder.parent}"
        for folder, there in zip(folders, free, strict=True)
    )
    raise UserInputError(
        f"the weights for the rollout engine take {size / 1e9:.3g} GB, but there are only {found}: "
        "make shared memory larger (of a container: --shm-size), or set TMPDIR to a disk with room"
    )


def send_weights(
    lm: nn.Module,
    dtype: torch.dtype,
    take: Callable[[Tensor], Tensor] | None,
    report: ReportProgress = report_nothing,
) -> Checksum:
    """Sends all weights, unsharded and with adapters merged; all ranks must call it.

    Args:
        lm: the policy's language model, whole, replicated or sharded.
        dtype: of the engine; that of the policy's forward passes.
        take: sends a tensor and returns it in that dtype. They come in the order of
            :func:`inventory`. None on the ranks that only take part in gathering.
        report: called with (elements done, elements).

    Returns:
        The checksum of the tensors that are not tied; empty without `take`.
    """
    tensors = inventory(lm, dtype)
    total, done = sum(_elements(t) for t in tensors), 0
    sums: list[Checksum] = []
    for info, source in zip(tensors, mergeable_weights(lm).values(), strict=True):
        whole = merged_weight(*source)
        if take is None:
            continue
        sent = take(whole)
        if not info.tied:
            sums.append(checksum([sent]))
        done += _elements(info)
        report(done, total)
    return sum(s[0] for s in sums) & MASK, sum(s[1] for s in sums) & MASK


class WeightsFile:
    """A safetensors file that is written one tensor at a time."""

    def __init__(self, path: Path, tensors: list[TensorInfo], dtype: torch.dtype) -> None:
        """Creates the file with its header."""
        self._dtype = dtype
        self._file = path.open("wb")
        self._file.write(header(tensors, dtype.itemsize))

    def write(self, tensor: Tensor) -> Tensor:
        """Writes the next tensor; returns it as it is written, on the host."""
        host = tensor.to("cpu", self._dtype).contiguous()
        self._file.write(host.view(-1).view(torch.uint8).numpy().data)
        return host

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def header(tensors: list[TensorInfo], size: int) -> bytes:
    """The header of a safetensors file: its length, then names, dtypes, shapes and offsets."""
    entries: dict[str, object] = {}
    at = 0
    for tensor in tensors:
        end = at + _elements(tensor) * size
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, end],
        }  # fmt: skip
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _elements(tensor: TensorInfo) -> int:
    return math.prod(tensor.shape)
