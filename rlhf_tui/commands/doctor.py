"""The command that checks the machine: doctor."""

import importlib.metadata
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import click
import msgspec

from engine import starter
from engine.config.sections.rollout import RolloutConfig
from engine.errors import SessionError, UserInputError
from engine.journal.json_values import Json
from engine.launch.environment import torch_cuda_version, torch_is_built_for_gpus
from engine.launch.rollout.engine import TESTED_VLLM, find_vllm, rollout_python
from engine.protocol import sockets
from rlhf_tui.commands.options import is_terminal, json_option, print_json, say, sessions_option

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "textual")


class FolderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The sessions folder."""

    folder: str
    writable: bool
    free_gb: float
    sockets: bool
    """Whether a Unix socket can be created there."""


class TerminalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The terminal."""

    term: str | None
    full_screen: bool


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What `doctor` prints, in this order. The fields are keys of its --json."""

    python: str
    packages: dict[str, str | None]
    """Version by package; None if it is not installed."""
    vllm: str
    """The vLLM that `rollout.engine: vllm` would use, and its Python; or `none`."""
    cores: int
    driver: str
    """NVIDIA's, and the newest CUDA that it supports; or `none`."""
    gpus: list[str]
    sessions: FolderFacts
    starter: bool
    """Whether the starter models of the demo are installed."""
    terminal: TerminalFacts


@click.command()
@sessions_option
@json_option
def doctor(root: Path, as_json: bool) -> None:
    """Check this machine: versions, GPUs, disk, sockets, terminal."""
    facts = MachineFacts(
        python=sys.version.split()[0],
        packages={p: _version(p) for p in PACKAGES},
        vllm=_vllm(),
        cores=len(os.sched_getaffinity(0)),
        driver=_driver(),
        gpus=_gpus(),
        sessions=_folder(root.resolve()),
        starter=all((starter.FOLDER / p).exists() for p in starter.PARTS.values()),
        terminal=TerminalFacts(term=os.environ.get("TERM"), full_screen=is_terminal()),
    )
    problems = _problems(facts)
    shown: Json = msgspec.to_builtins(facts)
    if as_json:
        print_json(shown | {"problems": problems})
    else:
        for key, value in shown.items():
            say(f"{key:<10} {_fact_text(value)}")
        for problem in problems:
            say(f"problem: {problem}")
    sys.exit(1 if problems else 0)


def _fact_text(value: object) -> str:
    """A fact for people: `yes` and `no`, lists and mappings on one line."""
    match value:
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(_counted(map(_fact_text, value))) or "none"
        case dict():
            return ", ".join(f"{_title(k)} {_fact_text(v)}" for k, v in value.items())
        case None:
            return "none"
        case _:
            return str(value)


def _counted(texts: Iterable[str]) -> list[str]:
    """Equal texts as one, with their number."""
    return [text if n == 1 else f"{n} × {text}" for text, n in Counter(texts).items()]


def _title(key: str) -> str:
    return key.replace("_gb", " GB").replace("_", " ")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm() -> str:
    """The vLLM build that is installed, and where; why it cannot be used, if that is known."""
    python = rollout_python(RolloutConfig(engine="vllm"))
    try:
        found = find_vllm(python)
    except UserInputError as error:
        return str(error)
    if found is None:
        return "none (only rollout.engine: vllm needs it; see make vllm)"
    tested = found.split()[-1].startswith(f"{TESTED_VLLM}.")
    note = "" if tested else f"; tested with {TESTED_VLLM}"
    return f"{found} ({python}){note}"


def _driver() -> str:
    """NVIDIA's driver and the newest CUDA that it supports; why it does not answer, or `none`."""
    import pynvml  # noqa: PLC0415 - only doctor needs it

    from engine.nvml import driver_version  # noqa: PLC0415 - as above

    try:
        version, (major, minor) = driver_version()
    except pynvml.NVMLError_LibraryNotFound:
        return "none"
    except pynvml.NVMLError as error:
        return f"does not answer: {error}"
    return f"{version}, for CUDA up to {major}.{minor}"


def _driver_problems() -> list[str]:
    """What prevents torch from using the GPUs of this machine, as far as their driver knows."""
    import pynvml  # noqa: PLC0415 - only doctor needs it

    from engine.nvml import (  # noqa: PLC0415 - as above
        driver_problem,
        driver_version,
        silent_gpus,
    )

    if problem := driver_problem():
        return [problem]
    try:
        _, driver = driver_version()
    except pynvml.NVMLError:  # there is none
        return []
    found = silent_gpus()
    built_for = torch_cuda_version()
    if built_for is not None and built_for[0] > driver[0]:  # in a major version, any driver will do
        found.append(
            f"torch is built for CUDA {_dotted(built_for)} and the driver is for CUDA up to "
            f"{_dotted(driver)}: update the driver, or install a build of torch for CUDA "
            f"{driver[0]}"
        )
    return found


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _gpus() -> list[str]:
    import pynvml  # noqa: PLC0415 - only doctor needs it

    from engine.nvml import gpu_handles  # noqa: PLC0415 - as above

    names = []
    with gpu_handles() as handles:
        for handle in handles:
            with suppress(pynvml.NVMLError):  # see _driver_problems
                names.append(str(pynvml.nvmlDeviceGetName(handle)))
    return names


def _folder(root: Path) -> FolderFacts:
    nearest = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    return FolderFacts(
        folder=str(root),
        writable=os.access(nearest, os.W_OK),
        free_gb=round(free / 1e9, 1),
        sockets=_sockets_work(nearest),
    )


def _sockets_work(folder: Path) -> bool:
    try:
        sock, path = sockets.listen(folder)
    except SessionError:
        return False
    sock.close()
    path.unlink(missing_ok=True)
    return True


def _problems(facts: MachineFacts) -> list[str]:
    found = [f"{p} is not installed" for p, v in facts.packages.items() if v is None]
    if not facts.sessions.writable:
        found.append(f"{facts.sessions.folder} is not writable; give --sessions DIR")
    if facts.sessions.free_gb < 1:
        found.append("less than 1 GB of disk is free in the sessions folder")
    if not facts.starter:
        found.append("the starter models are missing; install rlhf-tui again")
    if facts.gpus and not torch_is_built_for_gpus():
        found.append("there is a GPU but torch is a CPU build; install a CUDA build of torch")
    return found + _driver_problems()
