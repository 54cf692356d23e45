"""Records changes of settings that no operator asked for, such as after running out of memory."""

from engine.journal.writer import JournalWriter
from engine.protocol.rank_messages import Adjusted
from engine.supervisor.publisher import EventPublisher
from engine.supervisor.state import SupervisorState


def record_adjustment(
    adjusted: Adjusted, state: SupervisorState, journal: JournalWriter, publisher: EventPublisher
) -> None:
    """Records each change as an applied command, and notifies the operator of the reason.

    It may be called again with the same message after an error: the commands have the same ids.

    Raises:
        sqlite3.Error: the journal cannot be written.
    """
    for change in adjusted.changes:
        command_id = f"{adjusted.rule}-{journal.attempt}-{adjusted.step}-{change.key}-{change.new}"
        journal.commands.record_change(command_id, adjusted.step, change, "rlhf-tui")
    state.settings = state.settings | {c.key: c.new for c in adjusted.changes}
    journal.set_meta(settings=state.settings)
    publisher.notice(adjusted.rule, adjusted.text, adjusted.step)
