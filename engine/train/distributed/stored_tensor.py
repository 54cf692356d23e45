"""Tensors in safetensors files, read in parts.

The file is read, not mapped: the pages of a mapping would count as memory of the process, and their
unaligned offsets would select other kernels. Models are loaded through this module, one tensor at a
time, so that no rank ever holds more than what it keeps and one tensor.

Source: the format, https://huggingface.co/docs/safetensors (an 8-byte length, a JSON header with
the offsets, then the bytes of the tensors in row-major order).
"""

import functools
import hashlib
import io
import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from engine.train.distributed.ranks import one_thread

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Those that can be read here. A model with any other is read by transformers."""
PIECE = 1 << 20
"""Bytes that are converted to another dtype at once."""
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
SAMPLES, SAMPLE = 16, 4096
"""Parts of a file that its digest covers beside the header, and the bytes of each."""
STORED = "stored_tensor"
"""The attribute of a parameter on the meta device that says where its values are."""


class StoredTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor is stored."""

    path: str
    offset: int
    """Position of its first byte in the file."""
    shape: tuple[int, ...]
    dtype: str
    """A key of :data:`DTYPES`."""
    on_every_rank: bool = False
    """Whether every rank can read the file; otherwise rank 0 reads and sends."""
    changes: "tuple[LowRankChange, ...]" = ()
    """Adapters that are merged, in this order."""
    version: tuple[int, int] | None = None
    """The file's :func:`file_version`, which it must still have when it is read."""

    def with_versions(self) -> "StoredTensor":
        """The same tensor, which cannot be read once a file has changed."""
        changes = tuple(
            replace(c, first=c.first.with_versions(), second=c.second.with_versions())
            for c in self.changes
        )
        return replace(self, version=file_version(self.path), changes=changes)

    def read(
        self, first: int = 0, count: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Reads some rows, all by default.

        Args:
            first: the first row, an index of dimension 0.
            count: the number of rows; None for all from `first` on.
            dtype: of the result; None for the stored one.

        Returns:
            A new tensor on the CPU, (count, ...).

        Raises:
            OSError: the file cannot be read, or has changed.
        """
        shape, width = self.shape, 1
        if self.shape:
            rows = self.shape[0] - first if count is None else count
            shape, width = (rows, *self.shape[1:]), math.prod(self.shape[1:])
        tensor = torch.empty(shape, dtype=dtype or DTYPES[self.dtype])
        self.read_into(tensor, first * width)
        return tensor

    def read_into(self, tensor: Tensor, skip: int = 0) -> None:
        """Reads into a contiguous tensor, and converts to its dtype.

        Args:
            tensor: on any device; it determines how many values are read.
            skip: the number of values before the first one to read.

        Raises:
            OSError: the file cannot be read, or has changed.
        """
        if not self.changes:
            self._read_stored(tensor, skip)
            return
        exact = tensor
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            exact = temporary_tensor(tensor.shape)
        self._read_stored(exact, skip)
        for change in self.changes:
            change.add_to(exact, skip // self.shape[1])
        if exact is not tensor:
            tensor.copy_(exact)

    def _read_stored(self, tensor: Tensor, skip: int) -> None:
        stored, values = DTYPES[self.dtype], tensor.view(-1)
        converts = tensor.dtype != stored or tensor.device.type != "cpu"
        buffer = _buffer().view(stored) if converts else values
        with Path(self.path).open("rb", buffering=0) as file:
            if self.version is not None and file_version(file.fileno()) != self.version:
                raise OSError(f"{self.path} was changed while the model was read")
            file.seek(self.offset + skip * stored.itemsize)
            for part in values.split(len(buffer)) if len(values) else ():
                content = buffer[: len(part)]
                self._fill(file, content)
                if converts:
                    part.copy_(content)

    def _fill(self, file: io.FileIO, tensor: Tensor) -> None:
        content = tensor.view(torch.uint8).numpy().data
        while content:
            read = file.readinto(content)
            if not read:
                raise OSError(f"{self.path} has become shorter while it was read")
            content = content[read:]


class LowRankChange(msgspec.Struct, frozen=True):
    """What a LoRA adapter adds to a weight."""

    first: StoredTensor
    """(rank, inputs)."""
    second: StoredTensor
    """(outputs, rank)."""
    scale: float
    transposed: bool
    """Whether the weight is (inputs, outputs)."""

    def add_to(self, rows: Tensor, first: int) -> None:
        """Adds the change to float32 rows of the weight, of which the first has that index.

        The whole product is computed even for some rows, like peft does, to have the same bits.
        """
        inner, outer = (part.read(dtype=torch.float32) for part in (self.first, self.second))
        change = temporary_tensor((outer.shape[0], inner.shape[1]))
        with one_thread():
            torch.mm(outer, inner, out=change)
        change.mul_(self.scale)
        rows.add_((change.T if self.transposed else change)[first : first + len(rows)])


def file_version(file: str | int) -> tuple[int, int] | None:
    """Size and time of modification of a file, by path or descriptor; None if there is none.

    Not its inode, which some network file systems change.
    """
    try:
        found = os.stat(file)  # noqa: PTH116 - also a descriptor
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def temporary_tensor(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the CPU with memory of its own, not written to.

    Not from the heap: tensors that stay would fill the holes left by freed ones, so that each next
    one would need new memory.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(tuple(shape))


@functools.cache
def _buffer() -> Tensor:
    """For values to convert; (PIECE,) uint8.

    One for all tensors: buffers between the tensors that stay would leave holes in the heap, which
    the process keeps.
    """
    return torch.empty(PIECE, dtype=torch.uint8)


def mark_stored(parameter: nn.Parameter, stored: StoredTensor) -> None:
    """Notes where the values of a parameter on the meta device are."""
    setattr(parameter, STORED, stored)


def stored_of(tensor: Tensor) -> StoredTensor | None:
    """Where the values of a parameter are; None if it holds them itself."""
    found: StoredTensor | None = getattr(tensor, STORED, None) if tensor.is_meta else None
    return found


def held_values(parameter: Tensor) -> Tensor:
    """The values of a parameter, from its file if it is on the meta device."""
    stored = stored_of(parameter)
    return parameter.data if stored is None else stored.read(dtype=parameter.dtype)


def read_stored(module: nn.Module, device: torch.device) -> None:
    """Reads the parameters that are still in their files to a device, one at a time.

    The others of the module are left as they are.

    Args:
        module: the model, changed in place.
        device: a tensor that a CPU gets is not copied again.

    Raises:
        OSError: a file cannot be read.
    """

    def read(parameter: nn.Parameter) -> Tensor | None:
        stored = stored_of(parameter)
        if stored is None:
            return None
        values = stored.read(dtype=parameter.dtype)
        # accelerate numbers CPUs, and to `cpu:1` it is copied
        return values if device.type == "cpu" else values.to(device)

    replace_values(module, read)


def replace_values(module: nn.Module, values_of: Callable[[nn.Parameter], Tensor | None]) -> None:
    """Replaces parameters, also those on the meta device. Tied parameters stay tied.

    Args:
        module: changed in place.
        values_of: called once for each parameter; returns its new values, or None to leave it.
    """
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in replaced:
                values = values_of(parameter)
                replaced[parameter] = parameter
                if values is not None:
                    replaced[parameter] = nn.Parameter(values, parameter.requires_grad)
            part.register_parameter(name, replaced[parameter])


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        ValueError: it is not a safetensors file, or has a dtype that is not read here.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        header: dict[str, Any] = msgspec.json.decode(file.read(length))
        size = file.seek(0, os.SEEK_END)
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        tensor = StoredTensor(
            path=str(path),
            offset=8 + length + first,
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
        )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has the dtype {tensor.dtype}")
        wanted = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        if last - first != wanted or 8 + length + last > size:
            raise ValueError(f"{path} is damaged: {name} has other bytes than its shape")
        found[name] = tensor
    return found


def file_digest(path: Path) -> str:
    """A digest of a file's size, beginning, and samples; "" for a file that cannot be read.

    Tells whether two machines have the same file without reading all of it. It detects accidents,
    not attacks.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for k in range(SAMPLES + 1):
                file.seek(k * max(0, size - SAMPLE) // SAMPLES)
                digest.update(file.read(SAMPLE))
    except OSError:
        return ""
    return digest.hexdigest()
