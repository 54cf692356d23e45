"""The last reply to a command, wherever it is to be had: the engine, or else the journal."""

import math
import time

from engine.errors import LinkError
from engine.journal.reader import JournalReader
from engine.journal.rows import CommandRow
from engine.protocol.client import Client
from engine.protocol.client_messages import CommandReply
from engine.session.folder import Session

POLL_INTERVAL = 0.5
"""Seconds between two readings of the journal."""


def last_reply(
    client: Client, session: Session, command_id: str, timeout: float | None = None
) -> CommandReply:
    """Waits until a command that the engine has accepted is applied or rejected.

    An engine closes connections if there are too many, and all of them when it ends. The command is
    carried out all the same, so its end is then read from the journal: a new connection would only
    have another one give way.

    Args:
        client: has sent the command.
        session: whose engine has accepted it.
        command_id: of the command.
        timeout: seconds; None for as long as it takes.

    Raises:
        TimeoutError: it is still pending.
        LinkError: the engine has ended, and the command was neither applied nor rejected.
        JournalError: the journal cannot be read.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    try:
        return client.wait(command_id, timeout)
    except LinkError:
        client.close()
    with JournalReader(session) as record:
        while True:
            live = session.is_live()  # before the reading, which then sees the last rows
            command = record.command(command_id)
            if command is not None and command.status in ("applied", "rejected"):
                return _reply(command)
            if not live:
                raise LinkError(
                    f"the engine of '{session.name}' has ended, and its journal does not say "
                    f"whether the command was carried out; see: rlhf-tui status {session.name}"
                )
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(POLL_INTERVAL)


def _reply(command: CommandRow) -> CommandReply:
    return CommandReply(
        id=command.id, status=command.status, step=command.applied_step,
        reason=command.reason or "", changes=command.changes, result=command.result,
    )  # fmt: skip
