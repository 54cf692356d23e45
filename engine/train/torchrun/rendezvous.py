"""A torchrun rendezvous backend without pickles.

torch's `c10d` backend keeps its state as a pickle in a store that any peer can write to, and
unpickles it on every machine. This backend only stores a counter and host names, in the
authenticated store of the first machine.
"""

import contextlib
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # not exported
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from engine.errors import LinkError
from engine.protocol.rank_messages import COMING_KEY, STARTED_KEY
from engine.train.distributed.rank_store import RankStore

BACKEND = "rlhf-tui"
"""The name of this backend in torch's messages."""
PREFIX, COUNT = STARTED_KEY.split("/")
"""Prefix of the agents' keys, and key of the final number of machines in a start."""
COMING = COMING_KEY.removeprefix(f"{PREFIX}/")
COMING_TIMEOUT = timedelta(seconds=120)
"""Time to wait for a machine that has announced itself."""
CLOSED = 1_000_000
"""Added to the number of machines that have joined, so that a later one gets too high a number."""


class StoreRendezvous(RendezvousHandler):
    """Numbers the machines in order of arrival; the machine with the supervisor is always 0."""

    def __init__(
        self,
        endpoint: str,
        machines: int,
        timeout: float,
        *,
        first: bool,
        secret: str,
        fewest: int | None = None,
        join_wait: float = 0.0,
    ) -> None:
        """Stores the arguments; :meth:`next_rendezvous` connects.

        Args:
            endpoint: `HOST:PORT` of the first machine's store; unused if there is one machine.
            machines: number of machines in the run.
            timeout: seconds to wait for them.
            first: whether the supervisor runs on this machine.
            secret: of the run; unused if there is one machine.
            fewest: smallest number of machines with which the run starts; all by default.
            join_wait: seconds to wait for the others once there are enough.
        """
        self._endpoint = endpoint
        self._machines = machines
        self._timeout = timedelta(seconds=timeout)
        self._first = first
        self._secret = secret
        self._fewest = machines if fewest is None else fewest
        self._join_wait = timedelta(seconds=join_wait)
        self._store: RankStore | None = None

    def get_backend(self) -> str:
        """Returns :data:`BACKEND`."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits until enough machines have joined.

        Raises:
            LinkError: the first machine cannot be reached, a machine does not join in time, or
                enough machines have joined already.
        """
        store = self._connect()
        rank = 0 if self._first else int(store.add("machines", 1))
        if rank >= self._machines:
            raise LinkError(
                f"all {self._machines} machines of this run have joined already, or it has started"
            )
        store.set(f"machine/{rank}", os.uname().nodename)
        try:
            if self._first:
                store.set(COUNT, str(self._count_machines(store)))
            count = int(store.get(COUNT))
        except RuntimeError as error:
            raise LinkError(f"not all {self._fewest} machines joined: {error}") from error
        # Ranks ignore this address: they use the store named in RLHF_TUI_STORE.
        return RendezvousInfo(store, rank, count, RendezvousStoreInfo("127.0.0.1", 0))

    def _count_machines(self, store: Store) -> int:
        """Waits for the machines, closes the rendezvous to others, and returns their number.

        Raises:
            RuntimeError: too few machines have joined in time.
        """
        names = [f"machine/{rank}" for rank in range(self._machines)]
        store.wait(names[: self._fewest], self._timeout)
        if self._fewest < self._machines:
            with contextlib.suppress(dist.DistStoreError):  # no more machines come in time
                store.wait(names, self._join_wait)
            coming = int(store.add(COMING, 0))
            with contextlib.suppress(dist.DistStoreError):
                store.wait(names[: coming + 1], COMING_TIMEOUT)
        joined = int(store.add("machines", CLOSED)) - CLOSED
        count = min(joined + 1, self._machines)
        store.wait(names[:count], self._timeout)
        return count

    def _connect(self) -> Store:
        if self._machines == 1:
            return HashStore()
        # torch does not keep a store alive that Python code implements.
        self._store = RankStore(self._endpoint, self._secret, self._timeout)
        return PrefixStore(PREFIX, self._store)

    def is_closed(self) -> bool:
        """Returns False: an agent starts its ranks once, so no later rendezvous can be closed."""
        return False

    def set_closed(self) -> None:
        """Does nothing; see :meth:`is_closed`."""

    def num_nodes_waiting(self) -> int:
        """Returns 0: a machine that is late waits for the next start of the ranks."""
        return 0

    def get_run_id(self) -> str:
        """Returns a constant, because each start of the ranks has its own store."""
        return BACKEND

    def shutdown(self) -> bool:
        """Returns True: there is nothing to close."""
        return True
