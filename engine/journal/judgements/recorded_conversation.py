"""The conversation with an environment that a judged response is, as far as it is recorded."""

from collections.abc import Collection
from dataclasses import dataclass

from engine.journal.reader import JournalReader
from engine.protocol.rank_messages import SampleMessages
from engine.session.folder import SessionFolder


@dataclass(frozen=True)
class RecordedConversation:
    """Replies and messages of a response; None if not recorded, or without an environment."""

    replies: list[tuple[int, int]] | None = None
    """See :attr:`engine.journal.rows.SampleRow.replies`."""
    messages: SampleMessages | None = None


def conversations_of_reference(
    session: SessionFolder, prompts: Collection[str]
) -> dict[tuple[str, str], RecordedConversation]:
    """The conversations of the reference in probes, by prompt and response.

    Raises:
        JournalError: the journal cannot be read; it is not opened without prompts.
    """
    if not prompts:
        return {}
    with JournalReader(session) as journal:
        return {
            (prompt, probe.response): RecordedConversation(probe.replies, probe.messages)
            for prompt in prompts
            for probe in journal.reference_probes(prompt)
        }
