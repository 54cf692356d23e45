"""The environment and command line that ranks are started with."""

import os
import sys
from pathlib import Path

import msgspec

from engine.config.schema import LaunchConfig
from engine.monitoring.telemetry import gpu_count

TOKEN_VARIABLE = "RLHF_TUI_LINK_TOKEN"  # noqa: S105 - the name of a variable
SOCKET_VARIABLE = "RLHF_TUI_LINK_SOCKET"
NICE_VARIABLE = "RLHF_TUI_NICE"
STORE_VARIABLE = "RLHF_TUI_STORE"
LAUNCH_VARIABLE = "RLHF_TUI_LAUNCH"
JOINED_VARIABLE = "RLHF_TUI_JOINED"
PARENT_VARIABLE = "RLHF_TUI_PARENT"
"""How a rank is told its token, where its supervisor listens, how nice to be on a CPU, where the
ranks meet (`file:PATH` or `tcp:HOST:PORT`), `launch` of the configuration as JSON, that it is on
a machine that joined, and the process that it must not outlive."""

OTHER_LAUNCHERS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""Who is who, as a scheduler's script or another torchrun around us says it: not of our ranks."""


def clean_environment() -> dict[str, str]:
    """The environment for what we start: this process's own, without another launcher's words."""
    return {k: v for k, v in os.environ.items() if k not in OTHER_LAUNCHERS_VARIABLES}


OPENMP_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Has a thread that waits for the others look a thousand times, some microseconds, and then sleep.

As libgomp comes, threads spin for so long that a step takes 3 to 6 times as long on a machine that
does anything else. Put to sleep at once, a step on an idle one takes an eighth longer: decoding is
thousands of short parallel stretches. Ten thousand looks gain a little more there, and make a step
half as long again beside another busy process."""

MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 23), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Has glibc keep the memory that tensors free rather than give it back, only to ask for it again.

Each time, the kernel cleared every page anew: a fifth of a step's processor time on a CPU. Blocks
over 8 MB do go back: the holes they leave took more memory than clearing takes time."""


def ranks_per_node(launch: LaunchConfig) -> int:
    """Ranks on one machine: `launch.processes`, or one for each GPU, or one."""
    if isinstance(launch.processes, int):
        return launch.processes
    if launch.device == "cpu":
        return 1
    return len(launch.gpus) or max(1, gpu_count())


def rank_command(launch: LaunchConfig, folder: str, count: int) -> list[str]:
    """What starts the ranks of one machine."""
    if launch.nodes == 1 and count == 1:
        return [sys.executable, "-m", "engine.train.worker", folder]
    return [sys.executable, "-m", "engine.train.torchrun.agent", folder, str(count)]


def rank_environment(launch: LaunchConfig) -> dict[str, str]:
    """The environment ranks are started with, on any machine."""
    given = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        NICE_VARIABLE: str(launch.nice),
        PARENT_VARIABLE: str(os.getpid()),
        LAUNCH_VARIABLE: msgspec.json.encode(launch).decode(),
    }
    if launch.gpus:
        given["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, launch.gpus))
    return OPENMP_WAITING | MALLOC_SETTINGS | mkl_settings() | clean_environment() | given


def mkl_settings() -> dict[str, str]:
    """Makes MKL's results independent of where in memory its arguments lie, on Intel processors.

    Without it a matrix product of a few rows rounds differently for another address of the same
    weights: the KL between two equal models was 7e-6 nats a token on a Sapphire Rapids processor,
    and a resumed run would not repeat bit for bit. Products were as fast as without it there. On
    other makers' processors MKL takes one code path, and this setting would choose a slower one.
    """
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    if "GenuineIntel" not in processor:
        return {}
    return {"MKL_CBWR": "AVX512,STRICT" if "avx512f" in processor else "AVX2,STRICT"}
