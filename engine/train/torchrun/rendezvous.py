"""A torchrun rendezvous backend without pickles.

torch's `c10d` backend keeps its state as a pickle in a store that any peer can write, and unpickles
it on every machine. This backend stores only a counter and host names, in the authenticated store
of the first machine.
"""

import os
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # not exported
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from engine.errors import LinkError
from engine.launch.secret import SECRET_VARIABLE
from engine.train.distributed.rank_store import RankStore

BACKEND = "rlhf-tui"
"""The name that :func:`register` gives this backend in torchrun."""


class StoreRendezvous(RendezvousHandler):
    """Numbers the machines in order of arrival; the machine with the supervisor is always 0."""

    def __init__(
        self, endpoint: str, machines: int, timeout: float, *, first: bool, secret: str
    ) -> None:
        """Stores the arguments; :meth:`next_rendezvous` connects.

        Args:
            endpoint: `HOST:PORT` of the first machine's store; unused if there is one machine.
            machines: number of machines in the run.
            timeout: seconds to wait for all of them.
            first: whether the supervisor runs on this machine.
            secret: of the run; unused if there is one machine.
        """
        self._endpoint = endpoint
        self._machines = machines
        self._timeout = timedelta(seconds=timeout)
        self._first = first
        self._secret = secret
        self._store: RankStore | None = None

    def get_backend(self) -> str:
        """Returns :data:`BACKEND`."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits until all machines have joined.

        Raises:
            LinkError: the first machine cannot be reached, a machine does not join in time, or
                enough machines have joined already.
        """
        store = self._connect()
        rank = 0 if self._first else int(store.add("machines", 1))
        if rank >= self._machines:
            raise LinkError(f"all {self._machines} machines of this run have joined already")
        store.set(f"machine/{rank}", os.uname().nodename)
        names = [f"machine/{r}" for r in range(self._machines)]
        try:
            store.wait(names, self._timeout)
        except RuntimeError as error:
            raise LinkError(f"not all {self._machines} machines joined: {error}") from error
        # Ranks ignore this address: they use the store named in RLHF_TUI_STORE.
        return RendezvousInfo(store, rank, self._machines, RendezvousStoreInfo("127.0.0.1", 0))

    def _connect(self) -> Store:
        if self._machines == 1:
            return HashStore()
        # torch does not keep a store alive that Python code implements.
        self._store = RankStore(self._endpoint, self._secret, self._timeout)
        return PrefixStore("agents", self._store)

    def is_closed(self) -> bool:
        """False: an agent starts its ranks once, so there is no later rendezvous to close."""
        return False

    def set_closed(self) -> None:
        """Does nothing; see :meth:`is_closed`."""

    def num_nodes_waiting(self) -> int:
        """0: a machine that comes late waits for the next start of the ranks."""
        return 0

    def get_run_id(self) -> str:
        """A constant: each start of the ranks has its own store."""
        return BACKEND

    def shutdown(self) -> bool:
        """Returns True: there is nothing to close."""
        return True


def register() -> None:
    """Registers the backend with torchrun. Call it once, before `elastic_launch`."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> StoreRendezvous:
    return StoreRendezvous(
        parameters.endpoint,
        parameters.max_nodes,
        float(parameters.get("timeout")),
        first=bool(parameters.get("first")),
        # Not a parameter: torch logs those.
        secret=os.environ.get(SECRET_VARIABLE, ""),
    )
