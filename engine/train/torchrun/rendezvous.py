"""Where the torchrun agents of a run's machines meet.

torch's own `c10d` backend keeps its state as a pickle in a store that any peer can write, and
unpickles what it finds there. This one keeps only counters and names in the store.
"""

import os
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from engine.errors import LinkError

BACKEND = "rlhf-tui"
"""The name under which torchrun finds this backend; see :func:`register`."""


class StoreRendezvous(RendezvousHandler):
    """Numbers the machines in the order in which they arrive; the one with the supervisor is 0."""

    def __init__(self, endpoint: str, machines: int, timeout: float, *, first: bool) -> None:
        """Connects to nothing yet.

        Args:
            endpoint: `HOST:PORT` of the first machine's store; not used for a machine alone.
            machines: how many meet.
            timeout: seconds to wait for all of them.
            first: whether the supervisor runs on this machine.
        """
        self._endpoint = endpoint
        self._machines = machines
        self._timeout = timedelta(seconds=timeout)
        self._first = first

    def get_backend(self) -> str:
        """The backend's name."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits until all machines are there.

        Raises:
            LinkError: the first machine cannot be reached, others do not come in time, or all
                places are taken.
        """
        store = self._connect()
        rank = 0 if self._first else int(store.add("machines", 1))
        if rank >= self._machines:
            raise LinkError(f"all {self._machines} machines of this run are there already")
        store.set(f"machine/{rank}", os.uname().nodename)
        names = [f"machine/{r}" for r in range(self._machines)]
        try:
            store.wait(names, self._timeout)
        except RuntimeError as error:
            raise LinkError(f"not all {self._machines} machines came: {error}") from error
        # Ranks do not meet at this address but at the store that their environment names.
        return RendezvousInfo(store, rank, self._machines, RendezvousStoreInfo("127.0.0.1", 0))

    def _connect(self) -> Store:
        if self._machines == 1:
            return HashStore()
        host, _, port = self._endpoint.rpartition(":")
        try:
            store = TCPStore(host, int(port), is_master=False, timeout=self._timeout)
        except RuntimeError as error:
            raise LinkError(
                f"cannot reach the first machine at {self._endpoint}: {error}"
            ) from error
        return PrefixStore("agents", store)

    def is_closed(self) -> bool:
        """Agents start their ranks once: nothing is ever closed for a later round."""
        return False

    def set_closed(self) -> None:
        """See :meth:`is_closed`."""

    def num_nodes_waiting(self) -> int:
        """None wait: a machine that comes late joins the next start of the ranks."""
        return 0

    def get_run_id(self) -> str:
        """The same for all: each start of the ranks has a store of its own."""
        return BACKEND

    def shutdown(self) -> bool:
        """Nothing is left to close."""
        return True


def register() -> None:
    """Makes the backend known to torchrun; to be called before `elastic_launch`."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> StoreRendezvous:
    return StoreRendezvous(
        parameters.endpoint,
        parameters.max_nodes,
        float(parameters.get("timeout")),
        first=bool(parameters.get("first")),
    )
