"""Computes something on rank 0 while the other ranks wait for it."""

import time
from collections.abc import Callable

from engine.train.distributed.ranks import RankGroup

WAITING_INTERVAL = 10.0
"""Seconds between messages to the other ranks while they wait."""


def compute_on_rank_0(
    ranks: RankGroup,
    compute: Callable[[Callable[[], None]], bytes],
    waits: Callable[[], None],
) -> bytes:
    """Returns the bytes that rank 0 computes, on every rank; a collective.

    The other ranks get a message every :data:`WAITING_INTERVAL`, so that none is silent, or waits
    in a collective, for longer than rank 0 itself.

    Args:
        ranks: all ranks.
        compute: called on rank 0 with what it must call regularly. Returns at least one byte.
        waits: called regularly on the other ranks.
    """
    last = time.monotonic()

    def waiting() -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= WAITING_INTERVAL:
            last = now
            ranks.broadcast_bytes(b"")

    computed = compute(waiting) if ranks.is_lead else b""
    while not (data := ranks.broadcast_bytes(computed)):
        waits()
    return data
