"""Gets the last reply to a command: from the engine, or else from the journal."""

import math
import time

from engine.errors import LinkError
from engine.journal.reader import JournalReader
from engine.journal.rows import CommandRow
from engine.protocol.client import Client
from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Command, Stop
from engine.session.checkpoints import complete_checkpoints
from engine.session.folder import SessionFolder

POLL_INTERVAL = 0.5
"""Seconds between two readings of the journal."""


def last_reply(
    client: Client,
    session: SessionFolder,
    command: Command,
    command_id: str,
    timeout: float | None,
) -> CommandReply:
    """Waits until a command that the engine has accepted is applied or rejected.

    An engine closes connections if there are too many, and all of them when it ends. The command is
    still carried out, so its outcome is then read from the journal: a new connection would only
    make the engine close another one.

    Args:
        client: the client that sent the command.
        session: the session whose engine has accepted it.
        command: the command. A stop counts as carried out once the engine has ended, even if the
            journal does not record it, as on a full disk.
        command_id: of the command.
        timeout: seconds; None to wait without limit.

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
    with JournalReader(session) as reader:
        while True:
            live = session.is_live()  # before the reading, which then sees the last rows
            row = reader.command(command_id)
            if row is not None and row.status in ("applied", "rejected"):
                return _reply(row)
            if not live and isinstance(command, Stop) and row is None:
                last = reader.last_step()
                reason = f"the engine has ended and could not record it: {_what_is_saved(reader)}"
                return CommandReply(id=command_id, status="applied", step=last + 1, reason=reason)
            if not live:
                raise LinkError(
                    f"the engine of '{session.name}' has ended, and its journal does not say "
                    f"whether the command was carried out; see: {session.command('status')}"
                )
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(POLL_INTERVAL)


def _what_is_saved(reader: JournalReader) -> str:
    """Says whether a resume would repeat steps."""
    on_disk = complete_checkpoints(reader.session.checkpoints, lenient=True)
    recorded = {row.step for row in reader.checkpoints(("complete", "written"))}
    saved, last = max(on_disk.keys() & recorded, default=0), reader.last_step()
    if saved == last:
        return f"step {last}, the last one, is saved"
    return f"step {last} is not saved, a resume continues from step {saved}"


def _reply(row: CommandRow) -> CommandReply:
    return CommandReply(
        id=row.id, status=row.status, step=row.applied_step,
        reason=row.reason or "", changes=row.changes, result=row.result,
    )  # fmt: skip
