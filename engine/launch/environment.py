"""The command line and the environment of ranks."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

import msgspec

from engine.config.sections.launch import LaunchConfig
from engine.launch.parent_death import PARENT_VARIABLE
from engine.monitoring.telemetry import gpu_count
from engine.nvml import chosen_gpus

# What a rank reads from its environment. Others are PARENT_VARIABLE of engine.launch.parent_death
# and, with several machines, SECRET_VARIABLE of engine.launch.secret.
TOKEN_VARIABLE = "RLHF_TUI_LINK_TOKEN"  # noqa: S105 - the name of a variable
"""Holds the token that shows the supervisor that a rank is one of its own."""
SOCKET_VARIABLE = "RLHF_TUI_LINK_SOCKET"
"""The path of its supervisor's socket."""
NICE_VARIABLE = "RLHF_TUI_NICE"
"""Its niceness on a CPU."""
STORE_VARIABLE = "RLHF_TUI_STORE"
"""The rendezvous of the ranks: `file:PATH` or `tcp:HOST:PORT`."""
LAUNCH_VARIABLE = "RLHF_TUI_LAUNCH"
"""The configuration's `launch` section as JSON."""
JOINED_VARIABLE = "RLHF_TUI_JOINED"
"""Set if its machine joined the run."""
# On the first machine only, and not for native rollouts:
ROLLOUT_SOCKET_VARIABLE = "RLHF_TUI_ROLLOUT_SOCKET"
"""The socket of the rollout engine; see :func:`rollout_socket_variable`."""
ROLLOUT_FOLDER_VARIABLE = "RLHF_TUI_ROLLOUT_FOLDER"
"""The folder in shared memory in which the rollout engine is given weights."""
ROLLOUT_DISK_VARIABLE = "RLHF_TUI_ROLLOUT_DISK"
"""A folder on a disk for weights that do not fit there."""


def rollout_socket_variable(engine: int) -> str:
    """The variable that has the socket of one of `rollout.engines`, counted from 0."""
    return ROLLOUT_SOCKET_VARIABLE if engine == 0 else f"{ROLLOUT_SOCKET_VARIABLE}_{engine}"


OTHER_LAUNCHERS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""Set by a scheduler's script or an outer torchrun; they do not apply to our ranks."""


def clean_environment() -> dict[str, str]:
    """This process's environment for one that trains: without the variables of another launcher.

    PYTHONOPTIMIZE is at most 1: with 2 Python drops all docstrings, and transformers, which builds
    those of its outputs from them, cannot be imported.
    """
    found = {k: v for k, v in os.environ.items() if k not in OTHER_LAUNCHERS_VARIABLES}
    return found | {"PYTHONOPTIMIZE": "1"} if found.get("PYTHONOPTIMIZE") else found


OPENMP_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""A waiting thread spins a thousand times, some microseconds, and then sleeps.

By default libgomp's threads spin for so long that a step takes 3 to 6 times as long beside another
busy process. If they sleep at once, a step on an idle machine takes an eighth longer, because
decoding consists of thousands of short parallel regions. Ten thousand spins gain little on an idle
machine and make a step 1.5 times as long beside another busy process."""

LONG_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100001"}
"""A waiting thread spins for some milliseconds.

Where a sleeping thread takes long to wake up, as in a virtual machine, a step then takes 12 to 20 %
less. For a rank that has an idle core for each thread (`engine.train.distributed.idle_cores`). With
any other number, which is the user's, nothing is adapted."""


def threads_per_rank(launch: LaunchConfig, ranks: int) -> int:
    """`launch.threads`, or an equal share of the cores for each of `ranks` on this machine."""
    return launch.threads or max(1, len(os.sched_getaffinity(0)) // ranks)


def needs_most_cores(threads: int) -> bool:
    """Whether two teams of so many threads are more threads than this process has cores."""
    return 1 < threads <= len(os.sched_getaffinity(0)) < 2 * threads - 1


def openmp_waiting(launch: LaunchConfig, ranks: int | None) -> dict[str, str]:
    """How the threads of each of `ranks` on this machine wait for each other."""
    alone = ranks == 1 and "OMP_NUM_THREADS" not in os.environ and not has_cpu_quota()
    long = alone and needs_most_cores(threads_per_rank(launch, 1))
    return LONG_WAITING if long else OPENMP_WAITING


def has_cpu_quota(cgroups: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether a container limits the processor time of this process, which spinning would use."""
    with contextlib.suppress(OSError):
        return not (cgroups / "cpu.max").read_text(encoding="ascii").startswith("max")
    with contextlib.suppress(OSError):  # version 1
        return not (cgroups / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii").startswith("-")
    return False


MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(1 << 23), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Make glibc keep the memory that tensors free, instead of returning it and asking for it again.

The kernel would clear every page each time, which took a fifth of a step's processor time on a CPU.
Blocks over 8 MB are returned: keeping them fragments the heap and costs too much memory."""

ONEDNN_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Number of products of different shapes that oneDNN, and torch on top of it, keep prepared.

By default each keeps 1024. Responses differ in length from step to step, so nearly every step
brings new shapes, and one takes 0.5 MB: a run of the starter grew from 0.8 to 1.3 GB within 50
steps. A layer's shapes recur in each of the others and in the next token, which 128 are enough for:
a step takes the same processor time."""


LOG_ENCODING = {"PYTHONIOENCODING": "utf-8:backslashreplace"}
"""For processes whose output is a log of the session, which is read as UTF-8 whatever the locale.

Without it, a reward function that prints a response fails in some locales."""


GPU_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Makes CUDA number GPUs like the driver's tools and `launch.gpus`. By default the fastest is 0."""


ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""torch 2.9's name."""
OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""The name of earlier versions, still read first."""
GROWING_SEGMENTS = "expandable_segments:True"
"""Responses differ in length from step to step, so blocks of fixed segments can rarely be reused:
fragmented free memory counts as used."""
WITHOUT_GROWING_SEGMENTS = ("microsoft", "tegra")
"""Parts of the names of kernels whose GPU drivers fail at the first growing segment: WSL2
(pytorch/pytorch#192330) and Jetson (unslothai/unsloth#2401)."""
EXACT_PINNED_MEMORY = "pinned_max_round_threshold_mb:1"
"""By default torch rounds each piece of pinned host memory up to a power of two, so that the copies
of a checkpoint and frozen models on the host (`parallel.frozen: offload`) take up to twice their
size: a weight of 136 MB takes 268 MB."""
EXACT_SINCE = (2, 13)
"""The version of torch that this is known of; others end at a key that they do not know."""
TF32_OVERRIDE = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
"""Set in some container images: float32 products are then rounded to 10 bits whatever torch is
told, and the check of the first rollout takes that for an architecture that cannot be trained."""


def allocator_settings(launch: LaunchConfig) -> dict[str, str]:
    """Makes torch's allocators waste less memory, unless the user has configured them."""
    if launch.device == "cpu" or OLD_ALLOCATOR in os.environ:
        return {}
    parts = []
    if not any(part in os.uname().release.lower() for part in WITHOUT_GROWING_SEGMENTS):
        parts.append(GROWING_SEGMENTS)
    if torch_version() >= EXACT_SINCE:
        parts.append(EXACT_PINNED_MEMORY)
    return {ALLOCATOR: ",".join(parts)} if parts else {}


def ranks_per_node(launch: LaunchConfig) -> int:
    """The number of ranks on one machine: `launch.processes`, else one per GPU, else one.

    A torch that is built for CPUs uses one rank, however many GPUs there are.
    """
    if isinstance(launch.processes, int):
        return launch.processes
    if launch.device == "cpu" or not torch_is_built_for_gpus():
        return 1
    return len(launch.gpus) or max(1, gpu_count())


def torch_is_built_for_gpus() -> bool:
    """Whether the installed torch has CUDA or ROCm. True if that is not known."""
    built = _torch_builds()
    return not built or any(version != "None" for version in built.values())


def torch_version() -> tuple[int, int]:
    """The first two numbers of the installed torch's version; zeros if it is not known."""
    try:
        major, minor = importlib.metadata.version("torch").split(".")[:2]
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 0, 0


def torch_cuda_version() -> tuple[int, int] | None:
    """The version of CUDA that the installed torch is built for; None if there is none."""
    found = re.search(r"(\d+)\.(\d+)", _torch_builds().get("cuda", ""))
    return (int(found[1]), int(found[2])) if found else None


def _torch_builds() -> dict[str, str]:
    """What torch is built for, as its version file says; importing torch takes seconds.

    Empty if that cannot be read. `None` is the value of what it is not built for.
    """
    found = importlib.util.find_spec("torch")
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")  # type: ignore[arg-type, union-attr]  # None raises, too
    except (AttributeError, OSError, TypeError):
        return {}
    return dict(re.findall(r"^(cuda|hip)\b[^=\n]*= *(\S+)", text, re.MULTILINE))


def leave_deleted_folder(folder: Path) -> None:
    """Makes `folder` the current folder if that of this process has been deleted.

    Call it before ranks are started: MKL cannot load its libraries in a deleted folder.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        os.chdir(folder)


def rank_command(launch: LaunchConfig, folder: str, count: int) -> list[str]:
    """The command that starts the ranks of one machine; `count` is their number.

    With -P, as in every command that runs a module of ours, the working folder is not in sys.path:
    a file such as `random.py` or `h2.py` in it would be imported in place of the module that a
    library means.
    """
    if launch.nodes == 1 and count == 1:
        return [sys.executable, "-P", "-m", "engine.launch.rank", "engine.train.worker", folder]
    agent = "engine.train.torchrun.agent"
    return [sys.executable, "-P", "-m", "engine.launch.rank", agent, folder, str(count)]


def rank_environment(launch: LaunchConfig, ranks: int | None = None) -> dict[str, str]:
    """The environment of ranks on any machine, except for their token and addresses.

    Args:
        launch: the section of the configuration.
        ranks: how many of them are on this machine; None for another program that uses torch.
    """
    settings = {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        NICE_VARIABLE: str(launch.nice),
        PARENT_VARIABLE: str(os.getpid()),
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers would ask a service on the hub
        LAUNCH_VARIABLE: msgspec.json.encode(launch).decode(),
    }
    if launch.gpus:
        settings["CUDA_VISIBLE_DEVICES"] = ",".join(chosen_gpus(launch.gpus))
    defaults = openmp_waiting(launch, ranks) | MALLOC_SETTINGS | ONEDNN_CACHES
    defaults |= mkl_settings() | GPU_ORDER | allocator_settings(launch)
    found = defaults | clean_environment() | settings | LOG_ENCODING
    found.pop(TF32_OVERRIDE, None)
    return found


def mkl_settings() -> dict[str, str]:
    """Makes MKL's results independent of the addresses of its arguments, on Intel processors.

    Without it a matrix product of a few rows rounds differently for another address of the same
    weights: on a Sapphire Rapids processor the KL between two equal models was 7e-6 nats per token,
    and a resumed run did not repeat bit for bit. The products were as fast with it. On processors
    of other makers MKL has a single code path, and this setting would select a slower one.
    """
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    if "GenuineIntel" not in processor:
        return {}
    return {"MKL_CBWR": "AVX512,STRICT" if "avx512f" in processor else "AVX2,STRICT"}
