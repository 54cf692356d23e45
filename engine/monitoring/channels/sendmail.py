"""`notify.email`: e-mail by the machine's own sendmail program."""

import shlex
import shutil
import socket
from collections.abc import Sequence
from email.message import EmailMessage
from email.policy import SMTP

from engine.monitoring.channels.command import run_program
from engine.monitoring.channels.message import Notification, NotificationError
from engine.session.command_line import PROGRAM, recorded_command

FOLDERS = "/usr/sbin:/usr/lib:/usr/local/sbin"
"""Where to look for sendmail besides $PATH, which often lacks the administrators' programs."""
MAX_SUBJECT = 150


class EmailChannel:
    """Hands a plain text message to sendmail, which queues and delivers it."""

    name = "notify.email"

    def __init__(self, addresses: Sequence[str], program: str | None = None) -> None:
        """Stores the addresses; `program` is `sendmail` if it is None."""
        self._addresses = list(addresses)
        self._program = program or "sendmail"

    def missing_variables(self) -> list[str]:
        """Empty: it reads no variables."""
        return []

    async def send(self, message: Notification) -> None:
        """Runs sendmail.

        Raises:
            NotificationError: there is no such program, or it fails.
        """
        found = shutil.which(self._program) or shutil.which(self._program, path=FOLDERS)
        if found is None:
            raise NotificationError(
                f"there is no program {self._program}: install a mail transfer agent, or set "
                "notify.sendmail"
            )
        letter = self._letter(message).as_bytes(policy=SMTP.clone(linesep="\n"))
        await run_program([found, "-i", "--", *self._addresses], letter)

    def _letter(self, message: Notification) -> EmailMessage:
        letter = EmailMessage()
        letter["To"] = ", ".join(self._addresses)
        letter["Subject"] = f"[rlhf-tui] {message.title[:MAX_SUBJECT]}"
        letter["Auto-Submitted"] = "auto-generated"
        letter.set_content(f"{message.title}\n{_how_to_open(message)}")
        return letter


def _how_to_open(message: Notification) -> str:
    """The commands that show the session; an e-mail may be read on any machine."""
    if message.root is None:
        return ""
    host = socket.gethostname()
    here = recorded_command("attach", message.session, root=message.root)
    address = f"ssh://{host}/{message.session}"
    there = shlex.join([PROGRAM, "attach", address, "--sessions", str(message.root)])
    return f"\nOn {host}:\n{here}\n\nOn another machine:\n{there}\n"
