"""Exchanges bytes between ranks, and agrees on failures.

torch's object collectives (`all_gather_object` and similar) send pickles, through which anyone able
to impersonate a rank could run code. This module uses no pickles.
"""

import torch
import torch.distributed as dist

from engine.errors import CheckpointError, error_text


def all_gather_bytes(data: bytes, group: dist.ProcessGroup | None) -> list[bytes]:
    """Gathers bytes from all ranks, in rank order; lengths may differ. A collective.

    Args:
        data: this rank's bytes.
        group: a gloo group of all ranks; None for one rank.
    """
    if group is None:
        return [data]
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    longest = max(1, *(int(n) for n in lengths))
    padded = torch.zeros(longest, dtype=torch.uint8)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return [p[: int(n)].numpy().tobytes() for p, n in zip(parts, lengths, strict=True)]


def fail_together(error: BaseException | None, group: dist.ProcessGroup | None) -> None:
    """Raises on all ranks if an operation on files has failed on any. A collective.

    Without it, the ranks that succeeded would wait for the others in the next collective.

    Args:
        error: what this rank's operation raised, or None.
        group: a gloo group of all ranks; None for one rank.

    Raises:
        CheckpointError: names the first rank that failed and its error.
    """
    text = "" if error is None else error_text(error) or repr(error)
    for rank, other in enumerate(all_gather_bytes(text.encode(), group)):
        if other:
            raise CheckpointError(f"rank {rank}: {other.decode()}") from error
