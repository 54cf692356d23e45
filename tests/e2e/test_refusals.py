"""What cannot go well is refused with one clear line: a second engine, folders, a full disk."""

import os
import shutil
import socket
import subprocess

import pytest


def one_line(done, code):
    lines = [line for line in done.stderr.splitlines() if not line.startswith("session ")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_a_second_engine_is_refused_naming_the_first_ones_pid_and_host(endless):
    for mode in ("--headless", "--detach"):
        line = one_line(endless.lab.cli("resume", endless.name, mode), 1)
        assert str(endless.engine().pid) in line
        assert socket.gethostname() in line
    assert endless.state == "paused"


def test_the_engine_itself_refuses_to_be_the_second(endless, lab):
    # Past the command line's own look: two that start at the same moment.
    from engine.detach import start_engine  # noqa: PLC0415
    from engine.errors import SessionError  # noqa: PLC0415
    from engine.start import Start  # noqa: PLC0415

    with pytest.raises(SessionError, match=str(endless.engine().pid)):
        start_engine(endless.session, Start(), timeout=60)
    assert endless.state == "paused"


def test_a_living_session_is_not_deleted(endless):
    line = one_line(endless.lab.cli("rm", endless.name, "--yes"), 1)
    assert str(endless.engine().pid) in line
    assert endless.session.folder.is_dir()


def test_a_session_that_has_ended_is_deleted(lab, whole):
    copy = lab.root / "copy"
    shutil.copytree(whole.session.folder, copy)
    assert lab.cli("rm", "copy", "--yes").returncode == 0
    assert not copy.exists()


@pytest.mark.parametrize("command", ["status", "metrics", "samples", "events", "logs", "rm"])
def test_an_unknown_session_has_its_own_exit_code(lab, command):
    assert "ls" in one_line(lab.cli(command, "nobody"), 3)


def test_steering_a_session_without_an_engine_has_the_same_exit_code(whole):
    assert "resume" in one_line(whole.ctl("pause"), 3)


def test_a_sessions_folder_that_is_a_file_is_named(lab, tmp_path):
    place = tmp_path / "file"
    place.touch()
    done = lab.cli("demo", "--headless", "--sessions", place)
    assert str(place) in one_line(done, 1)


def test_a_sessions_folder_that_cannot_be_made_is_named(lab):
    done = lab.cli("demo", "--headless", "--sessions", "/proc/nowhere")
    assert "/proc/nowhere" in one_line(done, 1)


def test_a_lock_left_by_a_machine_that_went_down_is_no_obstacle(lab, whole):
    # What a power cut leaves: engine.json and the lock file, but nobody who holds it.
    copy = lab.root / "after-a-power-cut"
    shutil.copytree(whole.session.folder, copy)
    (copy / "engine.json").write_text(
        '{"pid": 1, "host": "elsewhere", "socket": "/nowhere", "version": "0"}'
    )
    assert (copy / "engine.lock").exists()
    done = lab.cli("resume", copy.name, "--headless")
    assert done.returncode == 0
    assert "train.steps=" in done.stdout
    shutil.rmtree(copy)


def test_a_damaged_session_does_not_hide_the_others(lab, whole):
    broken = lab.root / "broken"
    broken.mkdir()
    shutil.copy(whole.session.config_file, broken)
    (broken / "journal.db").write_bytes(b"not a database, by a long way" * 100)
    try:
        names = {row["name"]: row["state"] for row in lab.json("ls")}
        assert names["whole"] == "finished"
        assert names["broken"] == "unreadable"
        assert "journal.db" in one_line(lab.cli("status", "broken"), 1)
    finally:
        shutil.rmtree(broken)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB: room for a journal, not for a checkpoint."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_too_full_for_a_checkpoint_is_said_and_the_run_goes_on_to_its_end(
    make_lab, small_disk
):
    run = make_lab("full").run("full", "train.save_every=3")
    done = run.lab.cli(*run.arguments, "--headless", "--sessions", small_disk)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "no room for a checkpoint" in last
    assert "Traceback" not in done.stderr
    # Steps 3 and 6 could not be saved either: a notice each, and training went on.
    run.session = type(run.session)(small_disk / run.name)
    assert run.step == 8
    assert [e["step"] for e in run.events("alert") if e["rule"] == "checkpoint"][:2] == [3, 6]
    assert not list(run.session.checkpoints.glob("*"))


def test_a_disk_too_full_for_the_journal_ends_the_run_with_a_line(make_lab, small_disk):
    run = make_lab("fuller").run("fuller", "train.save_every=0")
    run.session = type(run.session)(small_disk / run.name)
    run.hold(2)
    process = run.lab.popen(*run.arguments, "--headless", "--sessions", small_disk)
    run.wait_at(2)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096):
                continue
        except OSError:
            pass
    run.release(2)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert str(run.session.folder) in stderr.splitlines()[-1]
    filler.unlink()
    # What was journalled before is there, and says that it did not end well.
    assert run.step == 1
    assert run.state in ("crashed", "failed")
