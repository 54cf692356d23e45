"""Where a rank computes: its device, its threads, its place among the others.

accelerate's `PartialState` reads what torchrun set up (RANK, LOCAL_RANK …) and picks the device; a
rank alone is the case of one.
"""

import os

import torch
from accelerate import PartialState

from engine.config import LaunchConfig
from engine.errors import UserInputError
from engine.protocol import NICE_VARIABLE


def choose_device(launch: LaunchConfig) -> torch.device:
    """What `launch.device` says; this rank's GPU where there are several.

    Raises:
        UserInputError: a GPU was asked for and torch sees none.
    """
    if launch.device == "cuda" and not torch.cuda.is_available():
        raise UserInputError("launch.device: cuda, but torch sees no GPU here; see rlhf-tui doctor")
    device = PartialState(cpu=launch.device == "cpu").device
    return torch.device(device)


def settle_on(device: torch.device, launch: LaunchConfig) -> int:
    """Threads and politeness of a rank on a CPU.

    The number of threads decides the order of sums and with it their rounding, so it is part of
    what makes a resumed run the same run.

    Returns:
        How many threads this rank computes with.
    """
    if device.type == "cpu":
        os.nice(int(os.environ.get(NICE_VARIABLE, "0")))
        torch.set_num_threads(launch.threads or len(os.sched_getaffinity(0)))
    return torch.get_num_threads()
