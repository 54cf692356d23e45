"""What `rlhf-tui verify` finds in a session, and that it finds nothing in a whole one."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from engine.journal import schema
from engine.journal.database import ReadOnlyDatabase
from engine.journal.judgements.labels import Response, set_label
from engine.launch.rollout.engine import START_SCRIPT
from engine.session.checkpoints import aside_path, checkpoint_path, mark_complete
from engine.session.folder import SessionFolder
from engine.verification import checkpoints, leftovers
from engine.verification.settings import SettingHistory
from engine.verification.verify import verify
from tests.waiting import until

DATA = Path(__file__).parents[1] / "data" / "sessions-0.1.0"


@pytest.fixture
def whole(make_session, write_in):
    """A session that has ended: two attempts, changed settings, a label, a checkpoint."""
    session = make_session()
    writer = write_in(session)
    writer.journal.begin_attempt(0, fresh=False)
    writer.steps(1, 2, **{"objective/kl": 0.5, "objective/kl_coef": 0.1})
    writer.change("first", 3, 0.1, 0.2)
    writer.change("rate", 3, 1e-5, 1e-4, key="learning_rate")
    writer.steps(3, 4, **{"objective/kl": 0.5, "objective/kl_coef": 0.2})
    writer.checkpoint(4)
    sum_checkpoint(session, 4, {"beta": 0.2, "learning_rate": 1e-4})
    writer.steps(5)
    writer.journal.begin_attempt(4, fresh=False)
    writer.steps(5, 6, **{"objective/kl": 0.5, "objective/kl_coef": 0.2})
    writer.order("late", "pause")
    writer.journal.commands.reject("late", "the run has ended")
    settings = {"beta": 0.2, "learning_rate": 1e-4, "controller": "fixed", "target": 6.0,
                "horizon": 100.0, "beta_min": 0.0, "beta_max": 10.0}  # fmt: skip
    writer.journal.set_meta(state="finished", settings=settings)
    sample = Response(response="answer 6.0", attempt=2, step=6, index=0)
    set_label(session, "prompt 0", sample, "good", "me")
    writer.journal.close()
    return session


def sum_checkpoint(session, step, settings):
    """Gives the checkpoint of a step a file, its sums, and the settings that it restores."""
    folder = checkpoint_path(session.checkpoints, step)
    (folder / "weights").write_bytes(b"weights")
    digest = subprocess.run(
        ["sha256sum", folder / "weights"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    content = {"hashes": {"weights": digest}, "state": {"settings": settings}}
    (folder / "state.json").write_text(json.dumps(content))
    mark_complete(folder)


def found(session):
    return [f"{f.check}: {f.text}" for f in verify(session).findings]


def test_nothing_is_found_in_a_whole_session(whole):
    assert found(whole) == []
    contents = verify(whole).contents
    assert (contents.state, contents.steps, contents.commands) == ("finished", 6, 3)
    assert (contents.checkpoints, contents.samples, contents.labels) == (1, 12, 1)


def test_a_checkpoint_that_was_moved_aside_is_checked_too(whole):
    aside = aside_path(whole.checkpoints, 4, 1)
    shutil.copytree(checkpoint_path(whole.checkpoints, 4), aside)
    assert found(whole) == []
    (aside / "weights").write_bytes(b"x")
    (problem,) = verify(whole).findings
    assert problem.text.startswith("the checkpoint 4-attempt-1, of an abandoned branch, is damaged")
    assert problem.advice.endswith(whole.command("rm", "--checkpoint", "4-attempt-1"))


def test_it_changes_no_file(whole):
    before = contents(whole.folder)
    verify(whole)
    assert contents(whole.folder) == before


def contents(folder):
    """Every file but the two that SQLite creates for readers."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".db-shm", ".db-wal")]
    return {path: path.read_bytes() for path in files}


DAMAGE = {
    "DELETE FROM steps WHERE step = 2": "steps: the journal has no row for steps 2",
    "DELETE FROM metrics WHERE step = 2": "steps: steps 2 have no metrics",
    "UPDATE metrics SET step = 9 WHERE step = 6": "steps: there are metrics of steps without a row",
    "UPDATE steps SET attempt = 7 WHERE step = 6": "steps: steps 6 belong to no attempt",
    "UPDATE steps SET attempt = 2 WHERE step = 1": "steps: step 2 is of attempt 1, after steps",
    "INSERT INTO steps_past VALUES (2, 6, 0)": "steps: steps 6 are on the timeline and on an",
    "DELETE FROM commands WHERE id = 'late'": "commands: commands were acknowledged and are lost",
    "DELETE FROM events WHERE kind = 'command'": "commands: commands have no event: first, rate",
    "UPDATE commands SET changes = '[]' WHERE id = 'rate'": "commands: applied commands have no",
    "UPDATE commands SET command = 'probe', status = 'applied', applied_step = 7 WHERE id = 'late'":
        "commands: applied commands have no effect: late",
    "UPDATE commands SET reason = '' WHERE id = 'late'": "commands: rejected commands have no reas",
    "UPDATE commands SET status = 'accepted' WHERE id = 'late'": "commands: the run has ended, and",
    "UPDATE checkpoints SET step = 5": "checkpoints: the disk lacks complete checkpoints of the",
    "DELETE FROM checkpoints": "checkpoints: the journal lacks the checkpoints of steps 4",
    "UPDATE checkpoints SET status = 'removed'": "checkpoints: checkpoints were to be removed and",
    "UPDATE commands SET live = 0 WHERE id = 'first'": "settings: step 3 has beta = 0.2, its histo",
    "UPDATE commands SET changes = replace(changes, '0.0001', '0.01') WHERE id = 'rate'":
        "settings: the checkpoint of step 4 has learning_rate = 0.0001, its history gives 0.01",
}  # fmt: skip


@pytest.mark.parametrize("query", DAMAGE)
def test_a_row_that_is_wrong_or_gone_is_found(whole, query):
    with closing(sqlite3.connect(whole.journal_file)) as db, db:
        db.execute(query)
    assert any(text.startswith(DAMAGE[query]) for text in found(whole)), found(whole)


SAMPLE_DAMAGE = {
    "UPDATE samples SET step = 8 WHERE step = 6": "samples: there are responses (samples) of steps",
    "DELETE FROM samples WHERE step = 3": "samples: there are per-token values without a sample",
    "DELETE FROM samples": "labels: labels are of samples that are not there: step 6 index 0",
}


@pytest.mark.parametrize("query", SAMPLE_DAMAGE)
def test_a_sample_that_is_wrong_or_gone_is_found(whole, query):
    with closing(sqlite3.connect(whole.samples_file)) as db, db:
        db.execute(query)
    assert any(text.startswith(SAMPLE_DAMAGE[query]) for text in found(whole)), found(whole)


def overwrite(path, text, at=0):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(text)


def add(session, name, text=b""):
    (session.folder / name).write_bytes(text)


FILE_DAMAGE = {
    "files: cannot read the journal": lambda s: overwrite(s.journal_file, b"\xff" * 40, 4096),
    "files: cannot read": lambda s: overwrite(s.samples_file, b"no database!"),
    "files: cannot read /": lambda s: (
        overwrite(s.samples_file, b"no database!"),
        s.journal_file.unlink(),
        shutil.rmtree(s.checkpoints),
    ),
    "files: config.yaml:": lambda s: s.config_file.write_text("train: {steps: none}"),
    "files: journal.db is missing": lambda s: s.journal_file.unlink(),
    "files: journal.db is missing; samples.db has": (
        lambda s: (s.journal_file.unlink(), shutil.rmtree(s.checkpoints))
    ),
    "samples: samples.db is missing": lambda s: s.samples_file.unlink(),
    "checkpoints: the checkpoint of step 4 is damaged: weights": lambda s: overwrite(
        s.checkpoints / "step-000004" / "weights", b"x"
    ),
    "leftovers: engine.json is left": lambda s: add(s, "engine.json"),
    "leftovers: files of interrupted writes are left: .config.yaml.1, checkpoints/.step-000005": (
        lambda s: (add(s, ".config.yaml.1"), (s.checkpoints / ".step-000005.part").mkdir())
    ),
    "access: other users can enter the session's folder (mode 0755)": lambda s: s.folder.chmod(
        0o755
    ),
    "access: other users can rename sessions": lambda s: s.folder.parent.chmod(0o777),
}


@pytest.mark.parametrize("text", FILE_DAMAGE)
def test_a_file_that_is_damaged_gone_or_left_is_found(whole, text):
    FILE_DAMAGE[text](whole)
    assert any(line.startswith(text) for line in found(whole)), found(whole)


@pytest.mark.parametrize("name", ["journal.db", "samples.db", "labels.db"])
def test_a_folder_in_the_place_of_a_database_is_found(whole, name):
    (whole.folder / name).unlink()
    (whole.folder / name).mkdir()
    text = f"files: cannot read {whole.folder / name}: it is not a file; move it away"
    assert text in found(whole), found(whole)


@pytest.mark.parametrize("name", ["journal.db", "samples.db", "labels.db"])
def test_a_loop_of_links_in_the_place_of_a_database_is_found(whole, name):
    (whole.folder / name).unlink()
    (whole.folder / name).symlink_to(name)
    text = f"files: cannot read {whole.folder / name}: Too many levels of symbolic links"
    assert any(line.startswith(text) for line in found(whole)), found(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_found(whole):
    os.chown(whole.config_file, 65534, -1)
    assert "access: files belong to another user than the folder: config.yaml" in found(whole)


def test_what_a_live_engine_writes_meanwhile_is_not_half_seen(writer):
    writer.steps(1)
    with closing(ReadOnlyDatabase(writer.session.journal_file, schema.JOURNAL)) as journal:
        with journal.snapshot():
            writer.steps(2)
            assert journal.rows("SELECT max(step) FROM steps") == [(1,)]
        assert journal.rows("SELECT max(step) FROM steps") == [(2,)]


@pytest.mark.parametrize("program", ["engine.launch.rank", str(START_SCRIPT)])
def test_a_process_that_outlives_its_engine_is_found(whole, program, monkeypatch):
    monkeypatch.setattr(leftovers, "END_TIMEOUT", 0.0)
    words = ["-c", "import time; time.sleep(60)", program, str(whole.folder)]
    with subprocess.Popen([sys.executable, *words]) as process:
        try:
            # A process that has just been started has no command line for an instant.
            until(lambda: psutil.Process(process.pid).cmdline()[1:] == words, "command line")
            text = f"leftovers: processes of the session outlive its engine: {process.pid}"
            assert text in found(whole)
        finally:
            process.kill()


def test_a_process_of_an_engine_that_is_just_ending_is_waited_for(whole):
    words = ["-c", "import time; time.sleep(0.5)", "engine", str(whole.folder)]
    with subprocess.Popen([sys.executable, *words]):
        assert found(whole) == []


@pytest.fixture
def crashed(tmp_path):
    """A session of an earlier version whose newest rows are in its write-ahead log only."""
    folder = tmp_path / "killed"
    shutil.copytree(DATA / "sessions" / "killed", folder)
    folder.chmod(0o700)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("@FOLDER@", str(DATA)))
    return SessionFolder(folder)


def test_what_a_crash_leaves_is_no_problem(crashed):
    assert verify(crashed).problems == 0
    assert [f.level for f in verify(crashed).findings] == ["note"]


@pytest.mark.parametrize("at", [0, 20, 32 + 24 + 100, 32 + 50 * (24 + 4096) + 30])
def test_transactions_that_a_damaged_log_hides_are_found(crashed, at):
    wal = crashed.folder / "journal.db-wal"
    overwrite(wal, b"\xff\xfe", at)
    assert any("journal.db-wal is damaged" in text for text in found(crashed)), found(crashed)


def test_a_log_that_was_cut_short_in_its_last_transaction_is_whole(crashed):
    wal = crashed.folder / "samples.db-wal"
    os.truncate(wal, wal.stat().st_size - 100)
    assert not [text for text in found(crashed) if "samples.db-wal" in text]


def test_the_folder_of_checkpoints_is_listed_as_often_for_many_as_for_one(writer, monkeypatch):
    listings, listed = [], checkpoints.complete_checkpoints
    monkeypatch.setattr(
        checkpoints,
        "complete_checkpoints",
        lambda folder, **given: listings.append(folder) or listed(folder, **given),
    )
    writer.steps(1)
    writer.checkpoint(1)
    verify(writer.session)
    of_one = len(listings)
    for step in range(2, 7):
        writer.steps(step)
        writer.checkpoint(step)
    verify(writer.session)
    assert len(listings) - of_one == of_one


class CountedStep(int):
    """A step that counts how often it is compared."""

    compared = 0

    def __le__(self, other):
        CountedStep.compared += 1
        return int(self) <= other

    def __gt__(self, other):
        CountedStep.compared += 1
        return int(self) > other

    def __eq__(self, other):
        CountedStep.compared += 1
        return int(self) == other

    __hash__ = int.__hash__


def test_a_setting_that_changed_at_every_step_is_looked_up_without_reading_all_changes():
    history = SettingHistory(0)
    history.changes = [(CountedStep(step), step) for step in range(2, 1002)]
    assert [history.during(step) for step in (1, 2, 501, 5000)] == [0, 2, 501, 1001]
    assert history.at_boundary(500) == [500, 501]
    assert history.at_boundary(1001) == [1001]
    assert CountedStep.compared < 200
