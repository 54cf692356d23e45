"""The process group of a run: device, rank, and collectives on small data.

torchrun starts the ranks and sets RANK, LOCAL_RANK and WORLD_SIZE; accelerate's `PartialState`
selects the device. A single rank is a group of size 1. The collectives here carry commands, token
ids and log-probabilities (B × T at most) over gloo on the CPU. torch communicates gradients and
weights itself (see :mod:`engine.train.distributed.sharding`).
"""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar, cast

import msgspec
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support
from torch import Tensor
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]  # not in its __all__

from engine.config.sections.launch import LaunchConfig
from engine.errors import UserInputError
from engine.examined import examined
from engine.launch.environment import NICE_VARIABLE, STORE_VARIABLE, threads_per_rank
from engine.launch.secret import SECRET_VARIABLE
from engine.memory.capacity import of_gpus
from engine.nvml import driver_problem, visible_gpus
from engine.protocol.rank_messages import LEAVING_KEY, WAITING_KEY
from engine.train.distributed.exchange import all_gather_bytes
from engine.train.distributed.idle_cores import TEAM_SIZE, adapt_thread_waits
from engine.train.distributed.rank_store import RankStore

log = logging.getLogger("engine")

T = TypeVar("T")
FINAL_BARRIER_TIMEOUT = 20.0
"""Seconds a finished rank waits for the other ranks."""
PEER_LOSS_TEXTS = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "TCPStore",
    "first machine of the run",
)
"""Parts of the error messages of a collective whose peer has ended."""


class RankGroup:
    """All ranks of an attempt.

    The methods are collectives unless they say otherwise: every rank must call them, in the same
    order.
    """

    def __init__(self, launch: LaunchConfig) -> None:
        """Initialises the process groups; a group of one rank without torchrun.

        Raises:
            UserInputError: `launch.device` is `cuda`, or `launch.gpus` is set, and torch finds no
                GPU; there are more ranks than GPUs on a machine; or only some ranks have a GPU.
            LinkError: the store of the first machine cannot be reached, or has another secret.
        """
        on_gpu, problem, self.device_note = _find_gpu(launch)
        """The note is a sentence if `launch.device: auto` leaves GPUs of this machine unused."""
        if self.device_note:
            log.warning("%s", self.device_note)
        # It runs nvidia-smi, so it is only asked about the GPUs that it is about.
        if on_gpu and "RTX" in torch.cuda.get_device_name() and not check_cuda_p2p_ib_support():
            # Older drivers report transfers between some of these GPUs that do not work:
            # accelerate refuses such a machine unless NCCL is told.
            for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
                os.environ.setdefault(name, "1")
        self.rank, self.size = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.group: dist.ProcessGroup | None = None
        """For the collectives of this class, over gloo; None for a single rank."""
        self.checkpoint_group: dist.ProcessGroup | None = None
        """Group for the saving threads, since two threads must not share a group."""
        self._machines: RankStore | None = None
        store = _store() if self.size > 1 or _has_machines() else None
        if isinstance(store, RankStore):
            self._machines = store
        if self.size > 1 and store is not None:
            self._store = store
            self.rank = int(os.environ["RANK"])
            timeout = timedelta(seconds=launch.timeout)
            self._store.set_timeout(timeout)
            agree_on_device(self._store, self.rank, self.size, on_gpu, problem)
            dist.init_process_group(
                "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=timeout,
                # Otherwise NCCL guesses the GPU from the rank and only creates its communicator in
                # the first collective, long after the start.
                device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else None,
            )
            self.group = _new_gloo_group(timeout)
            self.checkpoint_group = _new_gloo_group(timeout)
        elif problem:
            raise UserInputError(problem)
        self.device: torch.device = PartialState(cpu=not on_gpu).device
        # cuDNN's attention makes a plan for each shape it meets, and decoding meets one per token:
        # 37 ms for a call with a new length in bfloat16 on an H200 (torch 2.11), 0.09 ms without.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def is_lead(self) -> bool:
        """Whether this is rank 0, which communicates with the supervisor. Not a collective."""
        return self.rank == 0

    # -- collectives --------------------------------------------------------------------------

    def broadcast(self, make: Callable[[], T], kind: type[T]) -> T:
        """Returns what `make` returns on rank 0, where alone it is called, on every rank.

        Args:
            make: makes the value, which is sent in MessagePack.
            kind: the type of the value.
        """
        data = msgspec.msgpack.encode(make()) if self.is_lead else b""
        return msgspec.msgpack.decode(self.broadcast_bytes(data), type=examined(kind))

    def broadcast_bytes(self, data: bytes = b"") -> bytes:
        """Returns rank 0's bytes on every rank; the argument of the other ranks is ignored."""
        if self.size == 1:
            return data
        length = torch.tensor([len(data) if self.is_lead else 0], dtype=torch.int64)
        dist.broadcast(length, 0, group=self.group)
        if self.is_lead:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else None
        else:
            content = torch.empty(int(length), dtype=torch.uint8)
        if int(length) and content is not None:
            dist.broadcast(content, 0, group=self.group)
            return content.numpy().tobytes()
        return b""

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Returns the bytes of all ranks, in rank order, on every rank. Lengths may differ."""
        return all_gather_bytes(data, self.group)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Returns the sum over ranks of a tensor with a numeric or bool dtype; `x` is not changed.

        Also combines rows exactly: each rank fills its own rows and leaves the others 0.
        """
        if self.size == 1:
            return x
        total = x.to("cpu", torch.int64 if x.dtype == torch.bool else x.dtype, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(x.device, x.dtype)

    # -- shares of the work (not collectives) -------------------------------------------------

    def contiguous_share(self, count: int) -> range:
        """Returns this rank's contiguous indices out of `count`; shares differ by at most one."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def strided_share(self, rows: Tensor) -> Tensor:
        """Returns every `size`-th row, starting at this rank's number.

        If rows are sorted by length, all ranks get a similar load.
        """
        return self.strided_shares(rows)[self.rank]

    def strided_shares(self, rows: Tensor) -> list[Tensor]:
        """Returns the :meth:`strided_share` of each rank."""
        return [rows[rank :: self.size] for rank in range(self.size)]

    def final_barrier(self) -> None:
        """Waits until all ranks have finished; after this a rank may exit.

        A process that exits closes its sockets, and a rank still in its last collective would treat
        that as the loss of a peer. Uses the store, not the sockets of the process groups. Waits at
        most :data:`FINAL_BARRIER_TIMEOUT` seconds and raises nothing.
        """
        if self.size > 1:
            self._store.set(f"parting/{self.rank}", "1")
            keys = [f"parting/{rank}" for rank in range(self.size)]
            with contextlib.suppress(RuntimeError):  # the first machine may have exited
                self._store.wait(keys, timedelta(seconds=FINAL_BARRIER_TIMEOUT))

    # -- errors (not collectives) -------------------------------------------------------------

    def leave_error(self, error: bytes) -> None:
        """Writes the error of this rank to the store, where rank 0 reads it.

        A rank on another machine has no connection to the supervisor.
        """
        self._store.set(f"failed/{self.rank}", error.decode())

    def is_machine_leaving(self) -> bool:
        """Whether a scheduler is about to take away another machine of the run. For rank 0."""
        return self._machines is not None and self._machines.check([LEAVING_KEY])

    def is_machine_waiting(self) -> bool:
        """Whether a machine is waiting to join the next start of the ranks. For rank 0."""
        return self._machines is not None and self._machines.check([WAITING_KEY])

    def errors_left(self) -> list[bytes]:
        """Returns the errors that the other ranks have written with :meth:`leave_error`."""
        keys = [f"failed/{r}" for r in range(self.size) if r != self.rank]
        return [self._store.get(k) for k in keys if self._store.check([k])]


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error is only a consequence of another rank having ended."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in PEER_LOSS_TEXTS)
    )


def _store() -> Store:
    """A file on a single machine, which opens no port; otherwise the first machine's server."""
    _, _, address = os.environ[STORE_VARIABLE].partition(":")
    if not _has_machines():
        return FileStore(address, int(os.environ["WORLD_SIZE"]))
    return RankStore(address, os.environ[SECRET_VARIABLE])


def _has_machines() -> bool:
    """Whether the run is one of several machines, although only this one may have joined."""
    return os.environ.get(STORE_VARIABLE, "").startswith("tcp:")


def _new_gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    """Creates a group of all ranks. All must call it in the same order."""
    # torch 2.15's types allow for a rank that is not in the group.
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


def _find_gpu(launch: LaunchConfig) -> tuple[bool, str, str]:
    """Whether this rank computes on a GPU, an error text or "", and a note or ""."""
    if launch.device == "cpu":
        return False, "", ""
    ranks, problem, note = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "", ""
    unusable = _why_unusable() if torch.cuda.device_count() else _why_none()
    found = torch.cuda.device_count()
    if unusable:
        # The driver counts GPUs that this torch cannot use, for example if the driver is too old.
        problem = f"torch cannot use the GPUs here: {unusable}"
        if launch.device == "auto" and not launch.gpus and ranks == 1:
            problem, note = "", f"training on the CPU: {problem}"
        else:
            problem += "; launch.device: cpu trains without"
        found = 0
    elif launch.gpus and not found:
        named = ", ".join(map(str, launch.gpus))
        problem = f"launch.gpus: none of {named} is here; see rlhf-tui doctor"
        if not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
            problem = f"launch.gpus: none of {named} is among those in CUDA_VISIBLE_DEVICES here"
    elif launch.device == "cuda" and not found:
        why = "" if _is_built_for_gpus() else ": it is built for CPUs only"
        problem = f"launch.device: cuda, but torch sees no GPU here{why}; see rlhf-tui doctor"
    elif found and ranks > found:
        problem = (
            f"launch.processes: {ranks} ranks on this machine, but torch sees {found} "
            f"GPU{'s' if found > 1 else ''} here: use launch.processes: {found}"
        )
    return found > 0, problem, note


def _is_built_for_gpus() -> bool:
    return bool(torch.version.cuda or torch.version.hip)


def _why_none() -> str:
    """Why torch counts no GPU although this machine may have one; "" if it has none to use."""
    if visible_gpus() == []:
        return ""
    if _is_built_for_gpus():
        return driver_problem()
    return "it is built for CPUs only" if of_gpus([]) is not None else ""


def _why_unusable() -> str:
    """Why torch cannot use the GPUs that it counts, mostly in its own words; "" if it can."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.init()  # until then torch counts by the driver, which knows no MIG
            return _why_no_kernels(int(os.environ.get("LOCAL_RANK", "0")))
    lines = [str(w.message).strip().splitlines()[0] for w in said]
    return next((line for line in lines if line), "it finds no usable driver")


def _why_no_kernels(device: int) -> str:
    """Why this torch has no kernels for a GPU; "" if it has, or if that is not known.

    Builds of torch leave out old GPUs, and those newer than themselves. Each kernel would fail with
    "no kernel image is available".
    """
    architectures = torch.cuda.get_arch_list()
    if torch.version.hip or not architectures or device >= torch.cuda.device_count():
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        built = divmod(int(number), 10)
        # Machine code runs on later GPUs of the same major version, PTX is compiled on any.
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return ""
    return (
        f"this build has no kernels for {torch.cuda.get_device_name(device)}, of compute "
        f"capability {major}.{minor}, but for {' '.join(architectures)}"
    )


def agree_on_device(store: Store, rank: int, size: int, on_gpu: bool, problem: str) -> None:
    """Compares the devices of all ranks through the store, before the first collective.

    Args:
        store: shared by all ranks.
        rank: this rank's number.
        size: number of ranks.
        on_gpu: whether this rank computes on a GPU.
        problem: what prevents this rank from using its device, or "".

    Raises:
        UserInputError: a rank has a problem, or only some ranks have a GPU. Raised on all ranks.
    """
    host = os.uname().nodename
    store.set(f"device/{rank}", msgspec.json.encode((host, on_gpu, problem)).decode())
    kind = tuple[str, bool, str]
    devices = [
        msgspec.json.decode(store.get(f"device/{r}"), type=examined(kind)) for r in range(size)
    ]
    first_host = devices[0][0]
    for host, _, text in devices:
        if text:
            raise UserInputError(text if host == first_host else f"on {host}: {text}")
    with_gpu, without = ([host for host, gpu, _ in devices if gpu is k] for k in (True, False))
    if with_gpu and without:
        raise UserInputError(
            f"launch.device: torch sees a GPU on {with_gpu[0]} and none on {without[0]}: see "
            "rlhf-tui doctor there, or use launch.device: cpu"
        )


def set_threads_and_nice(ranks: RankGroup, launch: LaunchConfig) -> int:
    """Sets the number of threads and the niceness of a rank that computes on a CPU.

    The number of threads determines the order of sums, and so their rounding. A resumed run repeats
    bit for bit only with the same number.

    Returns:
        The number of threads this rank computes with.
    """
    if ranks.device.type == "cpu":
        os.nice(int(os.environ.get(NICE_VARIABLE, "0")))
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads_per_rank(launch, local_ranks))
    adapt_thread_waits()
    return torch.get_num_threads()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Context in which sums round in the same way with any number of threads."""
    with TEAM_SIZE:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
