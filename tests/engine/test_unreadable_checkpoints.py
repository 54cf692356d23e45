"""A checkpoint that cannot be read, such as one of another user, is neither damaged nor missing."""

import errno
import os

import pytest

from engine.errors import SessionError
from engine.journal.reader import JournalReader
from engine.journal.rows import ErrorEvent
from engine.launch.start import resume
from engine.launch.start_options import StartOptions
from engine.protocol.rank_messages import Failed
from engine.session import checkpoints
from engine.session.checkpoints import (
    checkpoint_path,
    complete_checkpoints,
    find_damage,
    incomplete_checkpoints,
)
from engine.verification.verify import verify
from tests.privileges import held_to_modes

GIVEN = {"reseed": False, "overrides": [], "who": "me"}


@pytest.fixture
def saved(writer):
    """A run with two checkpoints."""
    writer.steps(1, 2, 3, 4)
    for step in (2, 4):
        writer.checkpoint(step)
    writer.journal.set_meta(state="stopped")
    yield writer
    for step in (2, 4):
        checkpoint_path(writer.session.checkpoints, step).chmod(0o700)


@pytest.fixture
def newest(saved):
    """The folder of the newer one."""
    return checkpoint_path(saved.session.checkpoints, 4)


def test_a_resume_does_not_continue_from_the_one_before(saved, newest):
    newest.chmod(0)
    with held_to_modes(), pytest.raises(PermissionError, match="step-000004"):
        resume(saved.session, from_step=None, **GIVEN)


def test_an_older_one_is_left_out(saved):
    checkpoint_path(saved.session.checkpoints, 2).chmod(0)
    with held_to_modes():
        assert list(complete_checkpoints(saved.session.checkpoints)) == [4]
        assert resume(saved.session, from_step=None, **GIVEN).from_step == 4


def test_it_is_not_taken_for_the_rest_of_an_interrupted_save(saved, newest):
    newest.chmod(0)
    with held_to_modes():
        assert incomplete_checkpoints(saved.session.checkpoints) == []
        assert list(complete_checkpoints(saved.session.checkpoints, lenient=True)) == [2]


def test_a_file_of_another_user_is_not_damaged(newest):
    (newest / "state.json").chmod(0)
    with held_to_modes(), pytest.raises(PermissionError, match=r"state\.json"):
        find_damage(newest)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_file_system_that_is_away_damages_nothing(newest, monkeypatch, code):
    (newest / "COMPLETE").write_text("0" * 64)

    def away(_path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoints, "sha256", away)
    with pytest.raises(OSError, match=os.strerror(code)):
        find_damage(newest)


def test_a_bad_sector_is_damage(newest, monkeypatch):
    (newest / "COMPLETE").write_text("0" * 64)

    def broken(_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints, "sha256", broken)
    assert "Input/output error" in find_damage(newest)


def test_a_chosen_one_is_refused_and_nothing_is_changed(saved, newest):
    (newest / "state.json").chmod(0)
    with held_to_modes(), pytest.raises(SessionError, match=r"cannot be read.*nothing was changed"):
        resume(saved.session, from_step=4, **GIVEN)


@pytest.mark.parametrize("name", ["", "state.json"])
def test_verify_does_not_advise_to_remove_it(saved, newest, name):
    (newest / name).chmod(0)
    with held_to_modes():
        found = verify(saved.session).findings
    (unreadable,) = (f for f in found if "checkpoint" in f.text)
    assert "cannot be read" in unreadable.text
    assert "do not remove it" in unreadable.advice


async def test_a_run_that_cannot_begin_another_attempt_has_failed(engine, saved, newest):
    """A roll back, before whose attempt the file system went away."""
    newest.chmod(0)
    engine.shared.next = StartOptions(from_step=2, fresh=True)
    with held_to_modes():
        assert await engine.supervisor.run() == 1
    with JournalReader(saved.session) as reader:
        assert reader.meta().state == "failed"
        assert "step-000004" in reader.meta().message


async def test_a_restart_ends_the_run_instead_of_abandoning_its_steps(
    engine, saved, newest, caplog
):
    newest.chmod(0)
    engine.shared.attempt.start = StartOptions(from_step=2)
    failure = Failed(rank=0, text="the GPU is gone", traceback="in reward.py, line 3")
    engine.shared.attempt.record_failure(failure)
    with held_to_modes():
        assert engine.supervisor.attempt_end.handle(1) == 1
    assert engine.shared.next is None
    with JournalReader(saved.session) as reader:
        assert "the GPU is gone; the checkpoints cannot be read" in reader.meta().message
        errors = [e.payload for e in reader.events() if isinstance(e.payload, ErrorEvent)]
    assert [error.traceback for error in errors] == [failure.traceback]
    told = [r for r in caplog.records if "the GPU is gone" in r.getMessage()]
    assert [r.levelname for r in told] == ["ERROR"]
