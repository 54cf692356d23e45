"""Commands in the journal: recorded once, applied again after a resume, taken back."""

import pytest

from engine.config.settings import SettingChange
from engine.errors import JournalError
from engine.journal.reader import JournalReader


def test_settings_changed_after_a_checkpoint_are_applied_again_in_their_order(writer):
    writer.change("a", 3, 0.1, 0.2)
    writer.change("b", 5, 1e-5, 2e-5, key="learning_rate")
    writer.change("c", 5, 0.2, 0.3)
    writer.journal.begin_attempt(4, fresh=False)
    settled = writer.journal.commands.changes_after(4)
    assert [(s.step, s.changes[0].key, s.changes[0].new) for s in settled] == [
        (5, "learning_rate", 2e-5), (5, "beta", 0.3),
    ]  # fmt: skip


def test_starting_afresh_forgets_them(writer):
    writer.change("a", 3, 0.1, 0.2)
    writer.change("b", 5, 0.2, 0.3)
    writer.journal.begin_attempt(4, fresh=True)
    assert writer.journal.commands.changes_after(4) == []
    assert [s.changes[0].new for s in writer.journal.commands.changes_after(0)] == [0.2]


def test_a_change_contradicts_what_an_earlier_attempt_was_still_to_repeat(writer):
    writer.change("a", 5, 0.1, 0.2)
    writer.change("b", 6, 1e-5, 2e-5, key="learning_rate")
    writer.journal.begin_attempt(4, fresh=False)
    writer.change("c", 5, 0.1, 0.9)
    writer.journal.begin_attempt(4, fresh=False)
    settled = {c.key: c.new for s in writer.journal.commands.changes_after(4) for c in s.changes}
    assert settled == {"beta": 0.9, "learning_rate": 2e-5}


def test_a_change_taken_back_at_the_step_at_which_it_was_repeated_is_in_the_history_with_its_undo(
    writer,
):
    writer.change("before", 3, 0.5, 0.1)
    writer.change("a", 5, 0.1, 0.2)
    writer.journal.begin_attempt(4, fresh=False)
    writer.undo("u", 5, 0.2, 0.1)
    writer.journal.begin_attempt(4, fresh=False)
    commands = writer.journal.commands
    assert [c.command for c in commands.changes_after(4)] == ["set", "undo"]
    assert [changes[0].old for changes in commands.undoable(5)] == [0.5]


def test_a_change_contradicts_the_same_setting_alone_of_a_command_that_changed_several(writer):
    writer.order("kl", "kl", controller="adaptive", target=6.0)
    several = [
        SettingChange(key="controller", old="fixed", new="adaptive"),
        SettingChange(key="target", old=1.0, new=6.0),
    ]
    writer.journal.commands.apply("kl", 8, several)
    writer.journal.begin_attempt(4, fresh=False)
    writer.change("target", 5, 1.0, 3.0, key="target")
    repeated = [(r.step, c.key, c.new) for r in writer.journal.commands.changes_after(4)
                for c in r.changes]  # fmt: skip
    assert repeated == [(5, "target", 3.0), (8, "controller", "adaptive")]


def test_undo_finds_the_last_change_that_was_not_taken_back(writer):
    writer.change("a", 2, 0.1, 0.2)
    writer.change("b", 3, 0.2, 0.3)
    writer.undo("u", 4, 0.3, 0.2)
    writer.change("late", 9, 0.2, 0.7)
    (change,) = writer.journal.commands.undoable(4)[-1]
    assert (change.old, change.new) == (0.1, 0.2)
    assert len(writer.journal.commands.undoable(9)) == 2
    assert writer.journal.commands.undoable(1) == []


def test_undo_skips_a_command_that_changed_nothing(writer):
    writer.change("a", 2, 0.1, 0.2)
    writer.change("again", 3, 0.2, 0.2)
    assert [[c.new for c in changes] for changes in writer.journal.commands.undoable(3)] == [[0.2]]
    writer.undo("u", 4, 0.2, 0.1)
    assert writer.journal.commands.undoable(4) == []


def test_a_command_is_recorded_once_and_its_reply_stays(writer):
    writer.change("a", 2, 0.1, 0.2)
    assert not writer.journal.commands.record("a", "set", {}, "somebody else")
    answer = writer.journal.commands.reply("a")
    assert (answer.status, answer.step, answer.changes[0].new) == ("applied", 2, 0.2)
    with pytest.raises(JournalError, match="nobody"):
        writer.journal.commands.reply("nobody")


def test_what_an_engine_left_open_is_rejected_by_the_next(writer):
    writer.order("left", "pause")
    writer.change("done", 2, 0.1, 0.2)
    writer.journal.commands.reject_unfinished("it ended")
    assert writer.journal.commands.reply("left").reason == "it ended"
    assert writer.journal.commands.reply("done").status == "applied"


def test_a_commands_event_carries_its_whole_life(writer):
    writer.change("a", 2, 0.1, 0.2)
    writer.journal.commands.record("n", "note", {"text": "look"}, "me")
    with JournalReader(writer.session) as reader:
        events = reader.events()
        assert reader.events(after=events[-2].event) == events[-1:]
    event = next(e for e in events if e.kind == "command")
    assert (event.command.status, event.command.applied_step) == ("applied", 2)
    assert (event.command.changes[0].old, event.command.changes[0].new) == (0.1, 0.2)
    printed = event.as_json()
    assert (printed["old"], printed["new"], printed["who"]) == (0.1, 0.2, "me")
    notes = [e.payload for e in events if e.kind == "note"]
    assert [(n.text, n.who) for n in notes] == [("look", "me")]
