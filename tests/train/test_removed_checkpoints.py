"""Which checkpoints a save removes, moves aside or leaves alone."""

import resource
import shutil

import pytest
from msgspec.structs import replace

from engine.protocol.rank_messages import (
    Begin,
    CheckpointComplete,
    Notice,
)
from engine.session.checkpoints import (
    aside_checkpoints,
    checkpoint_path,
    complete_checkpoints,
)
from engine.session.file_signature import file_id
from engine.train.boundary import Boundary
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints import manager
from tests.train.supervisor_end import METRICS
from tests.waiting import LONG


def test_a_checkpoint_that_the_supervisor_needs_is_removed_after_a_later_save(trained):
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    supervisor.needed = [1]
    assert boundary.checkpoints.save() is None
    boundary.after_step(2, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    assert supervisor.wait_for(CheckpointComplete).removed == [1]
    assert [*complete_checkpoints(session.checkpoints)] == [1, 2]
    supervisor.needed = []
    boundary.after_step(3, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    assert [*complete_checkpoints(session.checkpoints)] == [3]


@pytest.mark.parametrize("full", [False, True])
def test_without_a_confirmation_only_a_full_disk_has_older_checkpoints_removed(
    trained, monkeypatch, full
):
    """On a full disk the journal waits for the room. Where it is locked, a roll back may wait."""
    _, session, boundary, supervisor = trained
    monkeypatch.setattr(manager, "REMOVAL_PATIENCE", 0.01)
    monkeypatch.setattr(checkpoint_folder, "has_room", lambda _folder: not full)
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    supervisor.confirms_removals = False
    boundary.after_step(2, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    assert supervisor.wait_for(CheckpointComplete).removed == [1]
    assert [*complete_checkpoints(session.checkpoints)] == ([2] if full else [1, 2])
    supervisor.confirms_removals = True
    monkeypatch.setattr(manager, "REMOVAL_PATIENCE", LONG)
    boundary.after_step(3, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    assert [*complete_checkpoints(session.checkpoints)] == [3]


def test_a_file_that_fits_on_the_disk_has_room(tmp_path):
    assert checkpoint_folder.has_room(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert not [*tmp_path.iterdir()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert checkpoint_folder.has_room(tmp_path)  # the limit is not of the disk
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_older_checkpoints_are_removed_after_each_save(trained):
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    boundary.checkpoints.save_if_due()
    boundary.after_step(2, dict(METRICS), 0.1)
    boundary.checkpoints.save_if_due()
    boundary.after_step(3, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    assert [*complete_checkpoints(session.checkpoints)] == [3]
    assert [m.removed for m in supervisor.of(CheckpointComplete)] == [[], [1], [2]]


def test_checkpoints_of_an_abandoned_branch_are_neither_counted_nor_removed(trained):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    run.config = replace(run.config, train=replace(run.config.train, keep_last=2))
    assert boundary.checkpoints.save() is None
    saved, abandoned = (checkpoint_path(session.checkpoints, step) for step in (1, 2))
    shutil.copytree(saved, abandoned)
    boundary.after_step(3, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    assert [*complete_checkpoints(session.checkpoints)] == [1, 2, 3]


def test_what_an_operator_saved_on_an_abandoned_branch_is_moved_by_a_save_of_its_step(
    trained, link
):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    for step in (2, 3):
        shutil.copytree(
            checkpoint_path(session.checkpoints, 1), checkpoint_path(session.checkpoints, step)
        )
    (checkpoint_path(session.checkpoints, 2) / "mine").touch()
    begin = Begin(attempt=3, from_step=1, checkpoints=[1], kept=[1], kept_aside={2: 1, 4: 1})
    later = Boundary(session, run, begin, link)
    for step in (2, 3, 4):
        later.after_step(step, dict(METRICS), 0.1)
        assert later.checkpoints.save() is None
    assert [*complete_checkpoints(session.checkpoints)] == [1, 4]
    assert (session.checkpoints / "step-000002-attempt-1" / "mine").exists()
    (told,) = [n.text for n in supervisor.of(Notice) if "abandoned branch" in n.text]
    assert told.endswith(f"(attempt 1) stays in {session.checkpoints}/step-000002-attempt-1")


def test_a_checkpoint_that_the_journal_lacks_is_not_replaced(trained, link):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    first, second = (checkpoint_path(session.checkpoints, step) for step in (1, 2))
    shutil.copytree(first, second)
    (second / "mine").touch()
    begin = Begin(attempt=2, from_step=1, checkpoints=[1], kept_aside={2: 0})
    later = Boundary(session, run, begin, link)
    later.after_step(2, dict(METRICS), 0.1)
    assert later.checkpoints.save() is None
    assert (session.checkpoints / "step-000002-attempt-0" / "mine").exists()
    (told,) = [n.text for n in supervisor.of(Notice) if "stays in" in n.text]
    assert told.startswith("the checkpoint of step 2, which the journal did not have, stays in")


def test_one_that_was_moved_aside_before_is_not_replaced_either(trained, link):
    """As after a second time that the journal is restored from an older copy."""
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    first, second = (checkpoint_path(session.checkpoints, step) for step in (1, 2))
    for name in ("first", "second"):
        shutil.copytree(first, second, dirs_exist_ok=True)
        (second / name).touch()
        begin = Begin(attempt=2, from_step=1, checkpoints=[1], kept=[1], kept_aside={2: 0})
        later = Boundary(session, run, begin, link)
        later.after_step(2, dict(METRICS), 0.1)
        assert later.checkpoints.save() is None
    found = aside_checkpoints(session.checkpoints)
    assert [*found] == ["2-attempt-0", "2-attempt-0-2"]
    kept = zip(found.values(), ("first", "second"), strict=True)
    assert all((folder / name).exists() for folder, name in kept)


def test_a_folder_that_cannot_be_looked_at_was_not_moved(trained, link):
    """As while a network file system is away."""
    run, session, _, _ = trained
    session.journal_file.touch()
    begin = Begin(attempt=2, from_step=1, checkpoints=[1], journal=file_id(session.journal_file))
    session.journal_file.unlink()
    session.journal_file.symlink_to("x" * 1000)
    later = Boundary(session, run, begin, link)
    later.after_step(2, dict(METRICS), 0.1)
    problem = later.checkpoints.save()
    assert "File name too long" in problem
    assert "moved" not in problem


def test_nothing_is_replaced_in_a_folder_that_has_taken_the_sessions_place(trained, link):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    first, second = (checkpoint_path(session.checkpoints, step) for step in (1, 2))
    part = checkpoint_folder.part_of(second)
    for folder in (second, part):
        shutil.copytree(first, folder)
    (checkpoint_path(session.checkpoints, 3)).mkdir()  # which the other session is deleting
    session.journal_file.touch()
    begin = Begin(attempt=2, from_step=1, checkpoints=[1], journal=file_id(session.journal_file))
    session.journal_file.rename(session.folder / "moved")
    session.journal_file.touch()
    before = {path: path.lstat().st_ino for path in session.checkpoints.rglob("*")}
    later = Boundary(session, run, begin, link)
    later.after_step(2, dict(METRICS), 0.1)
    assert "was moved, deleted or replaced" in later.checkpoints.save()
    assert {path: path.lstat().st_ino for path in session.checkpoints.rglob("*")} == before


def test_a_checkpoint_is_said_to_be_moved_aside_once_it_is(trained, link, monkeypatch):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    first, second = (checkpoint_path(session.checkpoints, step) for step in (1, 2))
    shutil.copytree(first, second)
    begin = Begin(attempt=3, from_step=1, checkpoints=[1], kept=[1], kept_aside={2: 1})
    later = Boundary(session, run, begin, link)
    later.after_step(2, dict(METRICS), 0.1)
    publish = checkpoint_folder.publish

    def fail(*_args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_folder, "publish", fail)
    assert later.checkpoints.save() is not None
    monkeypatch.setattr(checkpoint_folder, "publish", publish)
    assert later.checkpoints.save() is None
    told = [n.text for n in supervisor.of(Notice) if "abandoned branch" in n.text]
    assert len(told) == 1


def test_checkpoints_of_earlier_attempts_of_the_branch_are_removed(trained, link):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    begin = Begin(attempt=2, from_step=1, checkpoints=[1])
    later = Boundary(session, run, begin, link)
    later.after_step(2, dict(METRICS), 0.1)
    assert later.checkpoints.save() is None
    assert [*complete_checkpoints(session.checkpoints)] == [2]


def left_by_a_kill(session):
    """What a process leaves that is killed while it removes a checkpoint, and while it saves."""
    left = [session.checkpoints / name for name in ("step-000007", ".step-000008.part")]
    for folder in left:
        (folder / "policy").mkdir(parents=True)
    return left


def test_what_a_kill_left_of_checkpoints_is_removed_by_the_next_ranks(trained, link):
    run, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    left = left_by_a_kill(session)
    Boundary(session, run, Begin(attempt=2, from_step=1, checkpoints=[1]), link)
    assert not any(folder.exists() for folder in left)
    assert [*complete_checkpoints(session.checkpoints)] == [1]


def test_what_a_failed_save_left_is_removed_by_the_next_one(trained):
    _, session, boundary, supervisor = trained
    left = left_by_a_kill(session)
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    assert not any(folder.exists() for folder in left)


def test_an_old_checkpoint_that_cannot_be_read_is_kept_and_the_run_continues(trained):
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    (checkpoint_path(session.checkpoints, 1) / "state.json").write_text("{")
    boundary.after_step(2, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    assert [*complete_checkpoints(session.checkpoints)] == [1, 2]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_notice_and_the_run_continues(
    trained, tmp_path
):
    _, session, boundary, supervisor = trained
    supervisor.may_confirm.set()
    assert boundary.checkpoints.save() is None
    old = checkpoint_path(session.checkpoints, 1)
    old.symlink_to(old.rename(tmp_path / "another-disk"))
    boundary.after_step(2, dict(METRICS), 0.1)
    assert boundary.checkpoints.save() is None
    notice = supervisor.wait_for(Notice)
    assert (notice.step, notice.rule) == (2, "checkpoint")
    assert "step 1 cannot be removed" in notice.text
    assert boundary.before_step()
