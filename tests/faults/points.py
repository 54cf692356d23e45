"""The named points of a save, a command and a start at which a process is killed."""

from typing import NamedTuple


class Point(NamedTuple):
    """A function of the engine, and the call before or after which its process is killed."""

    kind: str
    place: str
    """MODULE:NAME."""
    when: str
    count: int = 1

    def text(self, marker: str, act: str = "kill") -> str:
        """The value of $RLHF_TUI_TEST_POINT."""
        return f"{self.place}|{self.when}|{self.count}|{act}|{marker}"


_SAVE = [
    ("engine.train.checkpoints.folder:clear_parts", "after", 2),
    ("engine.train.checkpoints.shards:save_shards", "before", 1),
    ("engine.train.checkpoints.shards:save_shards", "after", 1),
    ("engine.train.checkpoints.policy_folder:write_policy", "after", 1),
    ("engine.train.checkpoints.folder:sync_and_hash", "after", 3),
    ("engine.train.checkpoints.folder:publish", "before", 1),
    ("engine.train.checkpoints.folder:clear_parts", "before", 3),
    ("engine.train.checkpoints.folder:publish", "after", 1),
    ("engine.train.link:Link.wait_for_confirm", "before", 1),
    ("engine.train.link:Link.wait_for_confirm", "after", 1),
    ("engine.train.link:Link.wait_for_confirm", "before", 2),
    ("engine.session.checkpoints:mark_complete", "before", 1),
    ("engine.session.checkpoints:mark_complete", "after", 1),
    ("engine.session.checkpoints:remove", "before", 1),
    ("engine.session.checkpoints:mark_incomplete", "after", 1),
    ("engine.session.checkpoints:remove", "after", 1),
    ("engine.journal.logs.checkpoint_log:CheckpointLog.record", "before", 1),
    ("engine.journal.logs.checkpoint_log:CheckpointLog.record", "after", 1),
    ("engine.journal.logs.checkpoint_log:CheckpointLog.complete", "before", 1),
    ("engine.journal.logs.checkpoint_log:CheckpointLog.complete", "after", 1),
]
_COMMAND = [
    ("engine.journal.logs.command_log:CommandLog.record", "before", 2),
    ("engine.journal.logs.command_log:CommandLog.record", "after", 2),
    ("engine.journal.logs.command_log:CommandLog.accept", "after", 2),
    ("engine.journal.logs.command_log:CommandLog.reply", "before", 2),
    ("engine.supervisor.commands.pending_commands:PendingCommands.add", "before", 1),
    ("engine.supervisor.commands.pending_commands:PendingCommands.add", "after", 1),
    ("engine.train.boundary:Boundary._carry_out", "before", 1),
    ("engine.train.boundary:Boundary._carry_out", "after", 1),
    ("engine.journal.logs.command_log:CommandLog.apply", "before", 2),
    ("engine.journal.logs.command_log:CommandLog.apply", "after", 2),
    ("engine.supervisor.server:Server.send_reply", "before", 1),
    ("engine.supervisor.server:Server.send_reply", "after", 1),
]
_STEP = [
    ("engine.journal.writer:JournalWriter.record_step", "before", 2),
    ("engine.journal.writer:JournalWriter.record_step", "after", 2),
    ("engine.journal.logs.event_log:EventLog.write", "after", 4),
    ("engine.train.boundary:Boundary.after_step", "before", 2),
    ("engine.train.boundary:Boundary.after_step", "after", 2),
]
_START = [
    ("engine.session.folder:write_atomically", "before", 1),
    ("engine.session.folder:write_atomically", "after", 1),
    ("engine.session.folder:SessionFolder.write_engine", "before", 1),
    ("engine.session.folder:SessionFolder.write_engine", "after", 1),
    ("engine.journal.writer:JournalWriter.begin_attempt", "before", 1),
    ("engine.journal.writer:JournalWriter.begin_attempt", "after", 1),
    ("engine.train.load:load_run", "after", 1),
]
POINTS = [
    Point(f"kill at a point of a {kind}", *point)
    for kind, points in (
        ("save", _SAVE), ("command", _COMMAND), ("step", _STEP), ("start", _START),
    )
    for point in points
]  # fmt: skip

LIGHT_POINTS = [p for p in POINTS if not p.place.startswith("engine.train")]
"""Those that are reached without a model: the supervisor's, and the marker of a save."""
