"""What is recorded of a response beside its text."""

from collections.abc import Collection
from dataclasses import dataclass

from engine.journal.reader import JournalReader
from engine.protocol.rank_messages import Messages
from engine.session.folder import SessionFolder


@dataclass(frozen=True)
class Recorded:
    """The parts of a response; both None if they are not recorded, or without an environment."""

    replies: list[tuple[int, int]] | None = None
    """See :attr:`engine.journal.rows.SampleRow.replies`."""
    messages: Messages | None = None


def recorded_of_reference(
    session: SessionFolder, prompts: Collection[str]
) -> dict[tuple[str, str], Recorded]:
    """What is recorded of the reference's responses to probes, by prompt and response.

    Raises: JournalError: the journal cannot be read; it is not opened without prompts.
    """
    if not prompts:
        return {}
    with JournalReader(session) as journal:
        return {
            (prompt, probe.response): Recorded(probe.replies, probe.messages)
            for prompt in prompts
            for probe in journal.reference_probes(prompt)
        }
