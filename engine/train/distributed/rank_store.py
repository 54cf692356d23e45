"""torch's store interface on the authenticated store of a run over several machines."""

from datetime import timedelta
from typing import Self

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # not in its __all__

from engine.errors import LinkError
from engine.protocol.machines.store_client import StoreClient
from engine.protocol.machines.store_messages import (
    AddToKey,
    AppendToKey,
    CheckKeys,
    CompareAndSetKey,
    CountKeys,
    DeleteKey,
    SetKeys,
    StoreReply,
    StoreRequest,
)

CONNECT_TIMEOUT = 60.0
"""Seconds to try to reach the first machine."""


class RankStore(Store):
    """The store that process groups use to find each other.

    torch calls these methods from C++, some of them from threads of its own, by the names that its
    binding of `Store` gives them. Keep a reference as long as a process group exists: torch's own
    does not keep the Python object alive. Errors are those of torch's stores: DistStoreError if a
    key does not appear in time, DistNetworkError if the first machine is gone.
    """

    def __init__(self, address: str, secret: str, timeout: timedelta | None = None) -> None:
        """Connects to the first machine.

        Args:
            address: its `HOST:PORT`.
            secret: of the run.
            timeout: how long to wait for keys, unless a call says otherwise.

        Raises:
            LinkError: the first machine cannot be reached or has another secret.
        """
        super().__init__()
        self._client = StoreClient(address, secret.encode(), CONNECT_TIMEOUT)
        if timeout is not None:
            self.set_timeout(timeout)

    def set(self, key: str, value: str | bytes) -> None:
        """Sets a key."""
        self.multi_set([key], [value])

    def get(self, key: str) -> bytes:
        """The value of a key, once it exists."""
        return self.multi_get([key])[0]

    def add(self, key: str, value: int) -> int:
        """Adds to an integer; returns the sum."""
        return self._request(AddToKey(key=key, amount=value)).number

    def append(self, key: str, value: str | bytes) -> None:
        """Appends to a value."""
        self._request(AppendToKey(key=key, value=_bytes(value)))

    def compare_set(
        self, key: str, expected_value: str | bytes, desired_value: str | bytes
    ) -> bytes:
        """Sets a key if it has the expected value; returns its value after that."""
        request = CompareAndSetKey(
            key=key, expected=_bytes(expected_value), desired=_bytes(desired_value)
        )
        return self._request(request).values[0]

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        return bool(self._request(CheckKeys(keys=keys)).number)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits until all keys exist."""
        self._wait(keys, timeout, values=False)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of keys, once all exist."""
        return self._wait(keys, None, values=True).values

    def multi_set(self, keys: list[str], values: list[bytes] | list[str | bytes]) -> None:
        """Sets keys."""
        pairs = zip(keys, map(_bytes, values), strict=True)
        self._request(SetKeys(values=dict(pairs)))

    def deleteKey(self, key: str) -> bool:  # noqa: N802 - torch's name
        """Deletes a key; returns whether it existed. In Python: `delete_key`."""
        return bool(self._request(DeleteKey(key=key)).number)

    def getNumKeys(self) -> int:  # noqa: N802 - torch's name
        """The number of keys. In Python: `num_keys`."""
        return self._request(CountKeys()).number

    def has_extended_api(self) -> bool:
        """Yes: `append`, `multi_get` and `multi_set` save round trips."""
        return True

    def clone(self) -> Self:
        """The store itself, which any thread may use."""
        return self

    def _wait(self, keys: list[str], timeout: timedelta | None, *, values: bool) -> StoreReply:
        limit: timedelta = self.timeout if timeout is None else timeout  # type: ignore[attr-defined]  # not in the stub
        try:
            reply = self._client.wait(keys, limit.total_seconds(), values=values)
        except LinkError as error:
            raise dist.DistNetworkError(str(error)) from error
        if reply.missing is not None:
            raise dist.DistStoreError(f"wait timeout after {limit}: no key {reply.missing}")
        return reply

    def _request(self, request: StoreRequest) -> StoreReply:
        try:
            return self._client.request(request)
        except LinkError as error:
            raise dist.DistNetworkError(str(error)) from error


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
