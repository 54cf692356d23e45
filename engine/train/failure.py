"""Describes the error that ends a rank, for the supervisor."""

import contextlib

import msgspec
from msgspec.structs import replace

from engine.errors import (
    MAX_MESSAGE,
    DamagedCheckpointError,
    RlhfError,
    UserInputError,
    error_text,
    shortened,
    traceback_text,
)
from engine.examined import examined
from engine.protocol.rank_messages import Failed
from engine.train.distributed.ranks import RankGroup, is_peer_loss
from engine.train.out_of_memory import (
    LESS_MEMORY,
    StepOutOfMemoryError,
    is_out_of_memory,
    memory_text,
)

ADVICE_PREFIXES = ("CUDA error: ", "HIP error: ")
"""Beginnings of messages in which torch adds lines of advice for those who write kernels."""


def failed_message(error: Exception, ranks: RankGroup | None, rank: int) -> Failed:
    """Describes the error that ends this rank.

    If the error only says that another rank is gone, returns the message that the other rank left
    in the store. If there is none, sets `echo`: this error is only a consequence, and the
    supervisor looks for the cause in the messages of other ranks.

    Args:
        error: what was raised.
        ranks: None if this rank failed before the process group was formed.
        rank: this rank.
    """
    if isinstance(error, UserInputError):
        return Failed(rank=rank, text=shortened(error_text(error), MAX_MESSAGE), user_input=True)
    # An RlhfError is raised deliberately and would recur after a restart, so none follows. Any
    # other exception may be due to the hardware.
    deliberate, full = isinstance(error, RlhfError), is_out_of_memory(error)
    text = shortened(error_text(error), MAX_MESSAGE)
    if full:  # a restart with the same settings would run out again
        text = f"out of memory: {memory_text(error)}. {LESS_MEMORY}"
    elif not deliberate:
        if text.startswith(ADVICE_PREFIXES):
            text = text.splitlines()[0]
        text = f"{type(error).__name__}: {text}"
    failed = Failed(
        rank=rank, text=text, traceback=traceback_text(error), final=deliberate or full,
        damaged=isinstance(error, DamagedCheckpointError),
    )  # fmt: skip
    if isinstance(error, StepOutOfMemoryError) and error.change is not None:
        failed = replace(failed, step=error.step, changes=[error.change])
    if ranks is None or ranks.size == 1 or failed.damaged:
        return failed
    if is_peer_loss(error) and not full:
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            for message in ranks.errors_left():
                return msgspec.json.decode(message, type=examined(Failed))
        text = f"rank {rank} lost contact with the other ranks: {text}"
        return Failed(rank=rank, text=text, traceback=failed.traceback, echo=True)
    failed = replace(failed, text=f"rank {rank}: {text}")
    with contextlib.suppress(RuntimeError):
        ranks.leave_error(msgspec.json.encode(failed))
    return failed
