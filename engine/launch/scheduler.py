"""Reads the environment variables that a scheduler sets on each machine of a job.

The same command is started on every machine of a job. From these variables it learns which machine
it is on, how many there are, and how to reach the first one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import UserInputError

DEFAULT_PORT = 29400
"""The default port of the first machine."""
KNOWN_SCHEDULERS = "SLURM, SkyPilot, torchrun's PET_* or MASTER_ADDR, Kubernetes' indexed jobs"
"""For an error message."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The place of this machine in a job."""

    scheduler: str
    """Its name, for messages."""
    machine: int
    """0 runs the engine."""
    machines: int | None
    """None if the scheduler does not say."""
    first: str | None
    """Name or address of machine 0; None if the scheduler does not say."""
    port: int | None = None
    """The port on which machine 0 is to listen; None if the scheduler does not say."""
    job: str | None = None
    """Id that is equal on all machines and after a requeue; None if there is none."""


def placement(environment: Mapping[str, str], host: str) -> Placement | None:
    """Reads the variables of the scheduler that started this process.

    The more specific ones come first: SkyPilot may run on Kubernetes or SLURM, and operators of
    Kubernetes set torchrun's variables in indexed jobs.

    Args:
        environment: of this process.
        host: the full name of this machine (`socket.getfqdn()`), for Kubernetes.

    Returns:
        None if no scheduler is known to have started it.

    Raises:
        UserInputError: the variables contradict each other, or it is not the only process of its
            machine.
    """
    if "SKYPILOT_NODE_RANK" in environment:
        return _skypilot(environment)
    if "PET_NODE_RANK" in environment or "PET_NNODES" in environment:
        return _torchrun(environment)
    if "JOB_COMPLETION_INDEX" in environment:
        return _kubernetes(environment, host)
    if "SLURM_JOB_ID" in environment and "SLURM_NODEID" in environment:
        return _slurm(environment)
    if "MASTER_ADDR" in environment:
        return _generic(environment)
    return None


def _skypilot(environment: Mapping[str, str]) -> Placement:
    """https://docs.skypilot.co/en/latest/running-jobs/environment-variables.html."""
    addresses = environment.get("SKYPILOT_NODE_IPS", "").split()
    machines = _number(environment, "SKYPILOT_NUM_NODES", len(addresses) or 1)
    return Placement(
        scheduler="SkyPilot",
        machine=_number(environment, "SKYPILOT_NODE_RANK"),
        machines=machines,
        first=addresses[0] if addresses else None,
        # The same for all recoveries of a managed job.
        job=environment.get("SKYPILOT_TASK_ID"),
    )


def _torchrun(environment: Mapping[str, str]) -> Placement:
    """The arguments of torchrun as variables (PET_*), such as those of Kubeflow's trainers.

    PET_MASTER_ADDR and PET_MASTER_PORT, or PET_RDZV_ENDPOINT as `HOST` or `HOST:PORT`.
    """
    variable = "PET_RDZV_ENDPOINT"
    endpoint = environment.get(variable, "")
    host, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):  # an IPv6 address alone
        host, port = endpoint, ""
    host = host.strip("[]")
    first = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR") or host or None
    text = environment.get("PET_NNODES", "1")
    if not text.isdigit():
        raise UserInputError(f"PET_NNODES is {text}: a run has a fixed number of machines")
    if "PET_NODE_RANK" not in environment and int(text) > 1:
        raise UserInputError("PET_NNODES is set without PET_NODE_RANK, the number of this machine")
    return Placement(
        scheduler="torchrun",
        machine=_number(environment, "PET_NODE_RANK", 0),
        machines=int(text),
        first=first,
        port=_port(environment, "PET_MASTER_PORT") or _port({variable: port}, variable),
    )


def _kubernetes(environment: Mapping[str, str], host: str) -> Placement:
    """An indexed Job; the host names of its pods are `JOB-INDEX.SERVICE.NAMESPACE.svc…`.

    They resolve if the Job names a headless service as `subdomain`. The number of pods
    (`completions`) is not given.
    """
    machine = _number(environment, "JOB_COMPLETION_INDEX")
    name, _, domain = host.partition(".")
    job = name.removesuffix(f"-{machine}")
    known = job != name and bool(domain)
    return Placement(
        scheduler="Kubernetes",
        machine=machine,
        machines=None,
        first=f"{job}-0.{domain}" if known else None,
        job=job if job != name else None,
    )


def _slurm(environment: Mapping[str, str]) -> Placement:
    """A task that `srun` started; https://slurm.schedmd.com/srun.html."""
    if environment.get("SLURM_LOCALID", "0") != "0":
        raise UserInputError(
            "this is not the only task of its machine: srun --ntasks-per-node=1 starts one each; "
            "launch.processes is the number of ranks"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    machines = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1")
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:  # the id of a task changes when it is queued again
        job = f"{environment['SLURM_ARRAY_JOB_ID']}-{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return Placement(
        scheduler="SLURM",
        machine=_number(environment, "SLURM_NODEID"),
        machines=_number({"SLURM_NNODES": machines}, "SLURM_NNODES"),
        first=first_host(nodes) or None,
        job=f"slurm-{job}",
    )


def _generic(environment: Mapping[str, str]) -> Placement:
    """MASTER_ADDR and MASTER_PORT, with the number of this machine and of all machines.

    These are NODE_RANK and NNODES; or RANK and WORLD_SIZE, which some operators set for one process
    per machine.
    """
    if "LOCAL_RANK" in environment or "LOCAL_WORLD_SIZE" in environment:
        raise UserInputError(
            "this is a process of torchrun: start rlhf-tui launch itself, once on each machine; "
            "launch.processes is the number of ranks"
        )
    own = "NODE_RANK" if "NODE_RANK" in environment else "RANK"
    count = "NNODES" if "NNODES" in environment else "WORLD_SIZE"
    return Placement(
        scheduler="MASTER_ADDR",
        machine=_number(environment, own),
        machines=_number(environment, count),
        first=environment["MASTER_ADDR"],
        port=_port(environment, "MASTER_PORT"),
    )


def first_host(nodes: str) -> str:
    """The first name of a list in SLURM's notation: `gpu[08-11,20],cpu1` begins with `gpu08`."""
    first, depth = "", 0
    for letter in nodes:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            break
        first += letter
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UserInputError(f"{name} must be a number here, not {text}")
    return int(text)


def _port(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    port = _number(environment, name)
    if not 0 < port < 65536:
        raise UserInputError(f"{name} must be a port (1 to 65535), not {port}")
    return port


def machines(place: Placement, configured: int) -> int:
    """The number of machines of a run.

    Args:
        place: what the scheduler says.
        configured: `launch.nodes`.

    Raises:
        UserInputError: the two differ, or the number contradicts that of this machine.
    """
    if place.machines is not None and configured not in (1, place.machines):
        raise UserInputError(
            f"launch.nodes is {configured}, but {place.scheduler} has {place.machines} machines in "
            "this job: leave launch.nodes out"
        )
    found = place.machines or configured
    if place.machine >= found:
        raise UserInputError(
            f"{place.scheduler} says that this is machine {place.machine}, counted from 0, but "
            f"launch.nodes is {found}: give their number (-o launch.nodes=N)"
        )
    return found


def address(place: Placement, port: int) -> str:
    """`HOST:PORT` of the first machine.

    Args:
        place: what the scheduler says.
        port: if the scheduler names none.

    Raises:
        UserInputError: the scheduler does not name the machine.
    """
    if place.first is None:
        advice = "give it as launch.rendezvous: HOST:PORT"
        if place.scheduler == "Kubernetes":
            advice = (
                "name a headless service as subdomain of the pods (examples/launch), or " + advice
            )
        raise UserInputError(f"{place.scheduler} does not say how to reach machine 0: {advice}")
    host = f"[{place.first}]" if ":" in place.first else place.first
    return f"{host}:{place.port or port}"
