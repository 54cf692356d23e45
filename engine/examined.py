"""Types that any thread may decode.

msgspec examines a struct at its first use, and keeps what it finds in the class before that is
complete. A second thread that uses the struct meanwhile reads the incomplete part, and the process
ends with a segmentation fault (msgspec 0.22.0).
"""

import threading
from functools import cache
from typing import TypeVar

from msgspec.msgpack import Decoder

T = TypeVar("T")

_one_at_a_time = threading.RLock()


def examined(kind: T) -> T:
    """Returns a type for `msgspec`'s decoders, `convert` and `inspect`, after it was examined."""
    _examine(kind)
    return kind


@cache
def _examine(kind: object) -> None:
    with _one_at_a_time:
        Decoder(kind)
