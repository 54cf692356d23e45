"""The ranks of a run, seen from one of them: its device, its place, and what it says to the others.

torchrun starts the ranks and says who is who (RANK, LOCAL_RANK …), accelerate's `PartialState`
picks the device; a rank alone is the case of one. What travels here is small (orders, token ids,
log-probabilities: B × T at most) and goes over gloo on the CPU; gradients and weights are torch's
own business (see `sharding.py`).
"""

import contextlib
import os
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from engine.config.schema import LaunchConfig
from engine.errors import LinkError, RlhfError, UserInputError
from engine.launch.environment import NICE_VARIABLE, SOCKET_VARIABLE, STORE_VARIABLE

FINAL_BARRIER_TIMEOUT = 20.0
"""Seconds that ranks which are done wait for one another."""
PEER_LOSS_WORDS = (
    "gloo",
    "NCCL",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "TCPStore",
)
"""Words in the errors of collectives whose other side is gone."""


class PeerRankError(RlhfError):
    """What another rank met, and said, at a place where all wait for it."""


class RankGroup:
    """All ranks of an attempt. Every method is called by all of them, in the same order."""

    def __init__(self, launch: LaunchConfig) -> None:
        """Joins the others; alone where torchrun started nobody else.

        Raises:
            UserInputError: a GPU was asked for and torch sees none, or fewer than ranks; or some
                ranks have one and others have not.
        """
        on_gpu, problem = _look_for_gpus(launch)
        self.rank, self.size = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.group: dist.ProcessGroup | None = None
        """For what is said between steps, over gloo; None for a rank alone."""
        self.checkpoint_group: dist.ProcessGroup | None = None
        """For threads that save: two threads must not share a group."""
        if self.size > 1:
            self._store = _store()
            self.rank = _own_rank(self._store)
            patience = timedelta(seconds=launch.timeout)
            self._store.set_timeout(patience)
            agree_on_device(self._store, self.rank, self.size, on_gpu, problem)
            dist.init_process_group(
                "cuda:nccl,cpu:gloo" if on_gpu else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=patience,
            )
            self.group = dist.new_group(backend="gloo", timeout=patience)
            self.checkpoint_group = dist.new_group(backend="gloo", timeout=patience)
        elif problem:
            raise UserInputError(problem)
        self.device: torch.device = PartialState(cpu=not on_gpu).device
        # cuDNN's attention makes a plan for each shape it meets, and decoding meets one per token:
        # 37 ms for a call with a new length in bfloat16 on an H200 (torch 2.11), 0.09 ms without.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @property
    def is_lead(self) -> bool:
        """Whether this is rank 0, which talks with the supervisor."""
        return self.rank == 0

    # -- saying ------------------------------------------------------------------------------

    def broadcast_bytes(self, data: bytes = b"") -> bytes:
        """Rank 0's bytes, on every rank. The others' argument is not looked at."""
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
        """Every rank's bytes, by rank, on every rank."""
        if self.size == 1:
            return [data]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        longest = max(1, *(int(n) for n in lengths))
        own = torch.zeros(longest, dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else own[:0]
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return [p[: int(n)].numpy().tobytes() for p, n in zip(parts, lengths, strict=True)]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, of any number or bool dtype.

        Where each rank fills rows of its own and leaves the others 0 this puts them together
        exactly: x + 0 is x.
        """
        if self.size == 1:
            return x
        whole = x.to("cpu", torch.int64 if x.dtype == torch.bool else x.dtype, copy=True)
        dist.all_reduce(whole, group=self.group)
        return whole.to(x.device, x.dtype)

    # -- sharing out -------------------------------------------------------------------------

    def contiguous_share(self, count: int) -> range:
        """This rank's part of `count` things, one stretch; parts differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def strided_share(self, rows: Tensor) -> Tensor:
        """Every size-th of some rows: of rows in order of length, all ranks get like loads."""
        return rows[self.rank :: self.size]

    def largest_share(self, count: int) -> int:
        """The largest share that :meth:`strided_share` makes of `count` rows."""
        return -(-count // self.size)

    def final_barrier(self) -> None:
        """Waits until all ranks are here: from now on each may end when it likes.

        A process that ends closes its sockets, and one that is still in its last collective would
        take that for a loss. Asked at the meeting place, which needs none of these sockets.
        """
        if self.size > 1:
            self._store.set(f"parting/{self.rank}", "1")
            keys = [f"parting/{rank}" for rank in range(self.size)]
            with contextlib.suppress(RuntimeError):  # the first machine may be through already
                self._store.wait(keys, timedelta(seconds=FINAL_BARRIER_TIMEOUT))

    # -- trouble -----------------------------------------------------------------------------

    def leave_error(self, word: bytes) -> None:
        """Tells why this rank fails, for rank 0 to find: it may be on another machine."""
        self._store.set(f"failed/{self.rank}", word.decode())

    def errors_left(self) -> list[bytes]:
        """What other ranks said before they failed."""
        keys = [f"failed/{r}" for r in range(self.size) if r != self.rank]
        return [self._store.get(k) for k in keys if self._store.check([k])]


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error is only the echo of another rank's end."""
    return isinstance(error, dist.DistError | PeerRankError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_LOSS_WORDS)
    )


def _store() -> Store:
    """Where ranks meet: a file on one machine, which opens no port; else the first one's server."""
    kind, _, place = os.environ[STORE_VARIABLE].partition(":")
    if kind == "file":
        return FileStore(place, int(os.environ["WORLD_SIZE"]))
    host, _, port = place.rpartition(":")
    try:
        return TCPStore(host, int(port), is_master=False)
    except (dist.DistError, RuntimeError) as error:
        raise LinkError(f"cannot reach the first machine at {place}: {error}") from error


def _own_rank(store: Store) -> int:
    """This rank's number, counted from the one that has the supervisor beside it.

    Several machines meet in an order that torchrun decides; rank 0 must be where the link is. Taken
    round, neighbours on one machine stay neighbours.
    """
    number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if isinstance(store, FileStore):
        return number
    if SOCKET_VARIABLE in os.environ and os.environ["LOCAL_RANK"] == "0":
        store.set("lead", str(number))
    os.environ["RANK"] = str((number - int(store.get("lead"))) % size)
    return int(os.environ["RANK"])


def _look_for_gpus(launch: LaunchConfig) -> tuple[bool, str]:
    """Whether this rank computes on a GPU, and what is wrong with that, if anything is."""
    seen = torch.cuda.device_count() if launch.device != "cpu" else 0
    ranks, problem = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), ""
    if launch.device == "cuda" and not seen:
        problem = "launch.device: cuda, but torch sees no GPU here; see rlhf-tui doctor"
    elif seen and ranks > seen:
        problem = (
            f"launch.processes: {ranks} ranks on this machine, but torch sees {seen} "
            f"GPU{'s' if seen > 1 else ''} here: use launch.processes: {seen}"
        )
    return seen > 0, problem


def agree_on_device(store: Store, rank: int, size: int, on_gpu: bool, problem: str) -> None:
    """Holds the ranks' devices against one another, before any waits for another in a collective.

    Raises:
        UserInputError: one has a problem, or they compute on different kinds; on all ranks alike.
    """
    place = os.uname().nodename
    store.set(f"device/{rank}", msgspec.json.encode((place, on_gpu, problem)).decode())
    kind = tuple[str, bool, str]
    said = [msgspec.json.decode(store.get(f"device/{r}"), type=kind) for r in range(size)]
    for there, _, told in said:
        if told:
            raise UserInputError(told if there == said[0][0] else f"on {there}: {told}")
    with_gpu, without = ([there for there, on, _ in said if on is k] for k in (True, False))
    if with_gpu and without:
        raise UserInputError(
            f"launch.device: torch sees a GPU on {with_gpu[0]} and none on {without[0]}: mend that "
            "(see rlhf-tui doctor), or use launch.device: cpu"
        )


def set_threads_and_nice(ranks: RankGroup, launch: LaunchConfig) -> int:
    """Threads and politeness of a rank on a CPU.

    The number of threads decides the order of sums and with it their rounding, so it is part of
    what makes a resumed run the same run.

    Returns:
        How many threads this rank computes with.
    """
    if ranks.device.type == "cpu":
        os.nice(int(os.environ.get(NICE_VARIABLE, "0")))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads_of_a_rank(launch, here))
    return torch.get_num_threads()


def threads_of_a_rank(launch: LaunchConfig, ranks: int) -> int:
    """`launch.threads`, or a fair share of the processors for each rank of this machine."""
    return launch.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
