"""When the host looks at the sampled tokens, and which shapes are computed."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """How often the host reads sampled tokens from the device, and which shapes are computed."""

    check_every: int
    """Tokens between two checks for ended responses. Until the next check, their slots compute
    tokens that are discarded."""
    fixed_shapes: bool
    """Whether only a few read lengths of the cache and a few numbers of slots occur, so that few
    CUDA graphs cover all tokens. Otherwise ended slots are dropped at each check."""
    read_step: int = 256
    """With fixed shapes, the smallest difference between two read lengths of the cache. Each read
    length costs an extra pass over one token to capture a graph: 24 to 39 ms for 24 layers. Reading
    384 positions of 64 responses instead of 192 takes a layer 1 µs (both on an H200)."""


EXACT = Schedule(check_every=1, fixed_shapes=False)
"""For a CPU, which is synchronous anyway and where each row and position costs time."""
GRAPHED = Schedule(check_every=16, fixed_shapes=True)
"""For a GPU, where launches and checks cost more than unneeded rows and positions."""


def schedule_for(device: torch.device) -> Schedule:
    """Returns the schedule for a device."""
    return GRAPHED if device.type == "cuda" else EXACT
