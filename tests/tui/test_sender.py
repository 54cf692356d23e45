"""Commands are sent in order, and keys know what those on their way will do."""

import threading

import pytest

from engine.protocol.client_messages import CommandReply
from engine.protocol.commands import Checkpoint, Pause, SetBeta, Undo
from engine.session.folder import SessionFolder
from rlhf_tui.state import command_sender
from rlhf_tui.state.command_sender import CommandSender, OutgoingCommand, PendingEffects
from tests.waiting import until


def test_no_command_overtakes_the_one_before(engine, monkeypatch, root):
    # The first one dawdles for as long as another one could have passed it.
    passed, kind, replies = threading.Event(), command_sender.Client, []
    send = kind.send

    def dawdle(self, command, command_id):
        if isinstance(command, Checkpoint):
            passed.wait(0.3)
        else:
            passed.set()
        return send(self, command, command_id)

    monkeypatch.setattr(kind, "send", dawdle)
    sender = CommandSender("me")
    for command in (Checkpoint(), Undo()):
        session = SessionFolder(root / "frozen")
        sender.send(OutgoingCommand(session, command, "it", replies.append))
    until(lambda: len(replies) == 4, "replies")
    assert engine == [Checkpoint(), Undo()]
    assert sum(r.reply.status == "applied" for r in replies) == 2


def test_whatever_goes_wrong_in_sending_is_reported_and_the_next_command_is_sent(
    engine, monkeypatch, root
):
    kind, replies = command_sender.Client, []
    send = kind.send

    def fail_once(self, command, command_id):
        if isinstance(command, Checkpoint):
            raise KeyError("what nobody has thought of")
        return send(self, command, command_id)

    monkeypatch.setattr(kind, "send", fail_once)
    sender = CommandSender("me")
    for command in (Checkpoint(), Undo()):
        sender.send(OutgoingCommand(SessionFolder(root / "frozen"), command, "it", replies.append))
    until(lambda: len(replies) == 3, "replies")
    assert replies[0].problem == "KeyError: 'what nobody has thought of'"
    assert engine == [Undo()]


@pytest.fixture
def effects():
    effects = PendingEffects()
    effects.sent(command := SetBeta(value=0.2), "running")
    return effects, command


def test_beta_on_its_way_counts_until_the_journal_has_it(effects):
    effects, command = effects
    effects.read("running", 0.1)
    effects.replied(command, CommandReply(id="1", status="accepted"), 0.1)
    assert effects.beta(0.1) == 0.2
    effects.replied(command, CommandReply(id="1", status="applied", step=3), 0.1)
    assert effects.beta(0.1) == 0.2
    effects.read("running", 0.2)
    effects.read("running", 0.21)
    assert effects.beta(0.21) == 0.21


@pytest.mark.parametrize("answer", [None, CommandReply(id="1", status="rejected", reason="no")])
def test_a_beta_that_was_not_taken_counts_no_more(effects, answer):
    effects, command = effects
    effects.replied(command, answer, 0.1)
    assert effects.beta(0.1) == 0.1


def test_after_an_undo_the_beta_in_force_counts(effects):
    effects, _ = effects
    effects.sent(Undo(), "running")
    assert effects.beta(0.1) == 0.1


def test_a_pause_that_others_ended_is_not_held_on_to():
    effects = PendingEffects()
    effects.sent(Pause(), "running")
    assert effects.paused("running")
    effects.read("paused", 0.1)
    effects.read("running", 0.1)
    assert not effects.paused("running")


def test_a_pause_that_others_ended_between_two_readings_is_not_held_on_to():
    effects, command = PendingEffects(), Pause()
    effects.sent(command, "running")
    effects.replied(command, CommandReply(id="1", status="accepted"), 0.1)
    for _ in range(3):  # of the time before it took effect
        effects.read("running", 0.1)
    effects.replied(command, CommandReply(id="1", status="applied", step=3), 0.1)
    effects.read("running", 0.1)
    assert effects.paused("running")
    effects.read("running", 0.1)
    assert not effects.paused("running")
