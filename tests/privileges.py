"""Access rights that hold for root, too."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

_VERSION = 0x20080522  # of the structs of capget(2), with two sets of 32 capabilities
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextlib.contextmanager
def held_to_modes() -> Iterator[None]:
    """Context manager in which the modes of files bind this thread, even if it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    sets, changed = (_Set * 2)(), (_Set * 2)()
    header = _Header(_VERSION, 0)
    for found in (sets, changed):
        _check(libc.capget(ctypes.byref(header), found))
    changed[0].effective &= ~_OVERRIDES
    _check(libc.capset(ctypes.byref(header), changed))
    try:
        yield
    finally:
        _check(libc.capset(ctypes.byref(header), sets))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
