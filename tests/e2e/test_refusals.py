"""A second engine, unusable folders and full disks are refused with one clear line."""

import contextlib
import os
import shutil
import socket
import subprocess
from contextlib import closing

import pytest

from engine.errors import RlhfError
from engine.session.lock import SessionLock
from tests.e2e.terminal import Terminal
from tests.waiting import until


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
    # Bypasses the check of the command line, as two engines that start at the same moment do.
    from engine.errors import SessionError  # noqa: PLC0415
    from engine.launch.background import start_engine  # noqa: PLC0415
    from engine.launch.start_options import StartOptions  # noqa: PLC0415

    with pytest.raises(SessionError, match=str(endless.engine().pid)):
        start_engine(endless.session, StartOptions(), timeout=240)
    assert endless.state == "paused"


def test_a_session_whose_lock_file_is_deleted_gets_no_second_engine_and_is_locked_again(endless):
    endless.session.lock_file.unlink()
    assert not endless.session.is_live()
    for command in (("resume", "--detach"), ("rm", "--yes"), ("rm", "--checkpoint", "3", "--yes")):
        line = one_line(endless.lab.cli(command[0], endless.name, *command[1:]), 1)
        assert f"already has an engine (pid {endless.engine().pid} on" in line
    until(endless.session.is_live, "the lock")
    assert endless.state == "paused"


def test_an_engine_whose_session_another_one_has_taken_ends_and_writes_nothing(either_lab):
    run = either_lab.run("taken", steps=100_000)
    run.slow_down()
    run.start()
    run.session.lock_file.unlink()
    other = SessionLock(run.session.lock_file)  # as of an engine on another machine
    try:
        run.wait_gone()
        assert "another engine has taken the session" in run.session.log_file.read_text()
        with run.reader() as reader:
            assert reader.attempts()[-1].ended is None
    finally:
        other.release()
    run.resume()
    run.end()


def test_an_engine_ends_when_one_on_another_machine_has_begun_although_its_lock_is_not_seen(
    either_lab,
):
    run = either_lab.run("unseen", steps=100_000)
    run.slow_down()
    run.start()
    run.session.write_engine("/of/another/machine", "1")
    run.wait_gone()
    assert "has taken the session: this one ends at once" in run.session.log_file.read_text()
    with run.reader() as reader:
        assert reader.attempts()[-1].ended is None
    run.resume()
    run.end()


def test_a_running_session_is_not_deleted(endless):
    line = one_line(endless.lab.cli("rm", endless.name, "--yes"), 1)
    assert str(endless.engine().pid) in line
    assert f"stop it first: rlhf-tui ctl {endless.name} stop --wait" in line
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
    file = tmp_path / "file"
    file.touch()
    done = lab.cli("demo", "--headless", "--sessions", file)
    assert str(file) in one_line(done, 1)


def test_a_sessions_folder_that_cannot_be_made_is_named(lab):
    done = lab.cli("demo", "--headless", "--sessions", "/proc/nowhere")
    assert "/proc/nowhere" in one_line(done, 1)


def test_a_lock_left_by_a_machine_that_went_down_is_no_obstacle(lab, whole):
    # After a power cut engine.json and the lock file exist, but no process holds the lock.
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
def mount(tmp_path):
    """Mounts a tmpfs with the given options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def at(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if os.geteuid() or not shutil.which("mount"):
            pytest.skip("only root mounts a file system")
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield at
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def small_disk(mount):
    """A file system of 12 MB: enough space for a journal, but not for a checkpoint."""
    return mount("size=12m")


@pytest.fixture
def archive(mount, whole):
    """A sessions folder with one session, on a file system that is read-only even for root."""
    folder = mount("size=200m")
    shutil.copytree(whole.session.folder, folder / "whole")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    return folder


@pytest.mark.parametrize("mode", ["--detach", "--headless"])
def test_a_read_only_sessions_folder_is_reported(lab, archive, mode):
    line = one_line(lab.cli("demo", mode, "--name", "new", "--sessions", archive), 1)
    assert str(archive) in line
    assert "Read-only" in line
    assert [path.name for path in archive.iterdir()] == ["whole"]


@pytest.mark.parametrize(
    "command", [("resume", "-o", "train.steps=20", "--detach"), ("rm", "--yes"), ("note", "seen")]
)
def test_a_command_that_writes_to_an_archived_session_is_refused(lab, archive, command):
    name, *options = command
    done = lab.cli(name, "whole", *options, "--sessions", archive)
    assert done.returncode in (1, 3)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert (archive / "whole" / "journal.db").exists()


def test_an_archived_session_is_read_as_any_other(lab, archive, whole):
    where = ("--sessions", archive)
    states = {row["name"]: row["state"] for row in lab.json("ls", *where)}
    assert states["whole"] == "finished"  # besides running sessions in other folders
    assert lab.json("status", "whole", *where)["step"] == 8
    for command in ("metrics", "samples", "events"):
        assert lab.json(command, "whole", *where) == lab.json(command, "whole")
    assert lab.cli("logs", "whole", *where).stdout == lab.cli("logs", "whole").stdout


def test_an_archived_session_is_shown(lab, archive):
    with closing(
        Terminal(lab, "attach", "whole", "--read-only", "--sessions", archive)
    ) as terminal:
        until(lambda: "Newest responses, step 8" in terminal.screen, "dashboard")
        assert "read-only" in terminal.screen
        terminal.type("3")
        until(lambda: "RESPONSE" in terminal.screen, "samples")
        terminal.type("q")
        until(lambda: terminal.process.poll() == 0, "end of the app")


def started_on(disk, run):
    """Starts a run in the foreground, with its session on a disk; returns it and its process."""
    process = run.lab.popen(*run.arguments, "--headless", "--sessions", disk)
    run.session = type(run.session)(disk / run.name)
    return run, process


@pytest.mark.slow
def test_a_disk_too_full_for_a_checkpoint_is_reported_and_the_last_step_waits_for_room(
    make_lab, small_disk
):
    run, process = started_on(small_disk, make_lab("full").run("full", "train.save_every=3"))

    def waits():
        with contextlib.suppress(RlhfError):
            return any(e["rule"] == "last_save" for e in run.events("alert"))
        return False

    until(waits, "the wait for room", 120)
    # Steps 3 and 6 could not be saved either: each is an alert, and training continues.
    assert run.step == 8
    assert [e["step"] for e in run.events("alert") if e["rule"] == "checkpoint"] == [3, 6, 8]
    assert not list(run.session.checkpoints.glob("*"))
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "no room for a checkpoint" in stderr
    assert "Traceback" not in stderr
    assert [path.name for path in run.session.checkpoints.iterdir()] == ["step-000008"]


@pytest.mark.slow
def test_a_run_that_waits_for_room_ends_at_sigterm_and_a_resume_saves_its_last_step(
    make_lab, small_disk
):
    run, process = started_on(
        small_disk, make_lab("full-stopped").run("full-stopped", "train.save_every=0")
    )
    where = ("--sessions", small_disk)

    def waits():
        return run.session.is_live() and run.lab.json("status", run.name, *where)["waits_for"]

    until(waits, "the wait for room", 120)
    assert run.lab.cli("ctl", run.name, "stop", *where).returncode == 0
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "step 8, the last one, is not saved: resume the run once there is room" in stderr
    assert "Traceback" not in stderr
    assert (run.state, run.step) == ("failed", 8)
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    assert run.lab.cli("resume", run.name, "--headless", *where).returncode == 0
    assert run.state == "finished"
    assert [path.name for path in run.session.checkpoints.iterdir()] == ["step-000008"]


def test_a_disk_too_full_for_the_journal_ends_a_stopped_run_with_a_line(either_lab, small_disk):
    run = either_lab.run("fuller", "train.save_every=0")
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
    until(lambda: run.lab.json("status", run.name, "--sessions", small_disk)["waits_for"], "a wait")
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert str(run.session.folder) in stderr.splitlines()[-1]
    filler.unlink()
    # The journal keeps the earlier steps, and the state shows the failure.
    assert run.step == 1
    assert run.state in ("crashed", "failed")
