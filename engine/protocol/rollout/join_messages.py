"""Messages between the first machine of a run and one that joined it to generate.

The connection is authenticated (:mod:`engine.protocol.machines.authentication`). The joined machine
sends :class:`Joined` and gets :class:`RolloutJoinInfo`. Then the messages of
:mod:`engine.protocol.rollout.messages` follow, as between rank 0 and an engine. Files that they
name are sent first, in :class:`FilePart`. The joined machine replaces the paths in the messages by
its own.
"""

import hmac
from collections.abc import Callable

from engine import __version__
from engine.config.sections.launch import LaunchConfig
from engine.config.sections.rollout import RolloutConfig
from engine.protocol.frames import Message, decoder
from engine.protocol.rollout.messages import Generate, LoadWeights, NextTurns, Start

PART = 4 * 1024 * 1024
"""Bytes of a file per message."""
WEIGHTS = "weights.safetensors"
"""The name of the file of an update; all other files belong to the model's configuration."""


class Joined(Message, frozen=True, tag="rollout_joined"):
    """A machine offers to generate."""

    machine: str
    """Its name, for messages."""
    software: str = __version__
    joined_before: bool = False
    """Whether it has generated for this run before, and so awaits its end."""


class RolloutJoinInfo(Message, frozen=True, tag="rollout_join_info"):
    """What a joined machine needs to start its engine."""

    session: str
    launch: LaunchConfig
    rollout: RolloutConfig


class JoinRefused(Message, frozen=True, tag="rollout_join_refused"):
    """Sent instead of :class:`RolloutJoinInfo`: why the machine cannot take part."""

    text: str


class RunOver(Message, frozen=True, tag="run_over"):
    """Sent instead of :class:`RolloutJoinInfo`: no machine is needed any more."""


class FilePart(Message, frozen=True, tag="file_part"):
    """The next bytes of a file; offset 0 starts a new file."""

    name: str
    offset: int
    size: int
    """Bytes of the whole file."""
    data: bytes


ToJoined = (
    RolloutJoinInfo | JoinRefused | RunOver | FilePart | Start | LoadWeights | Generate | NextTurns
)

decode_to_joined: Callable[[bytes], ToJoined] = decoder(
    ToJoined, "a message to a machine that generates"
)
"""Decodes the first machine's message. Raises LinkError."""
decode_joined: Callable[[bytes], Joined] = decoder(Joined, "the offer of a machine that generates")
"""Decodes the first message of a joined machine. Raises LinkError."""


def rollout_secret(secret: str) -> bytes:
    """The secret of these connections, derived from that of the run.

    It differs from the store's, so that a handshake with one cannot be relayed to the other.
    """
    return hmac.digest(secret.encode(), b"rlhf-tui rollout", "sha256")
