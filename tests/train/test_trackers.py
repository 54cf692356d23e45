"""Experiment trackers: run ids, failures and secrets, with real trackers in their own process."""

import json
import shutil
import stat

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import starter
from engine.config import file as config_file
from engine.config.rules.trackers import TRACKER_PACKAGES
from engine.errors import ConfigError
from engine.launch.inputs import check_inputs
from engine.session.folder import SessionFolder, create
from engine.train.reports import trackers as reports
from engine.train.reports.tracker_kinds import KINDS, Header, make_tracker
from engine.train.reports.tracker_program import MAX_LOG
from engine.train.reports.trackers import TrackerProcess, shown_config
from tests.waiting import until

MODULE = '''
import json
import time
from pathlib import Path
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker

class Lines(GeneralTracker):
    """Appends what it is given to a file."""
    name = "lines"
    requires_logging_directory = True
    main_process_only = False
    tracker = None

    def __init__(self, project, folder, run_name, run_id):
        super().__init__()
        self.file = Path(folder) / "lines.jsonl"
        self.run = [project, run_name, run_id]

    def _write(self, *values):
        with self.file.open("a") as file:
            print(json.dumps([self.run, *values]), file=file)

    def store_init_configuration(self, values):
        self._write("config", values)

    def log(self, values, step=None, **kwargs):
        print("this is not a problem")
        get_logger(__name__).debug("accelerate's trackers log, too")
        self._write(step, values)

    def finish(self):
        self._write("end")

class Broken(Lines):
    def _write(self, *values):
        pass

    def log(self, values, step=None, **kwargs):
        raise OSError("no route\\nto host")

class Hangs(Lines):
    def log(self, values, step=None, **kwargs):
        time.sleep(1000)

class Ends(Broken):
    def store_init_configuration(self, values):
        print("too much " * 2_000_000)
        raise SystemExit("no account")
'''
OVERRIDES = (
    "log.trackers=[tensorboard, 'my_trackers:Lines', 'my_trackers:Broken', 'absent:Tracker', "
    "'my_trackers:Ends']",
    "log.project=films", "notify.command=send --as s3cret",
)  # fmt: skip


def demo(*overrides):
    """The demo's configuration with keys overridden."""
    return config_file.load(starter.FOLDER / "demo.yaml", overrides)


@pytest.fixture(scope="module")
def two_attempts(tmp_path_factory):
    """A session whose trackers got three steps, and the last of them again after a resume."""
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "my_trackers.py").write_text(MODULE)
    session = create(folder, "mine", demo(*OVERRIDES))
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        record(session, told)
    return session, told


def record(session, told):
    """Two attempts of a run."""
    for steps in ([1, 2, 3], [3, 4]):
        trackers = TrackerProcess(session, demo(*OVERRIDES), lambda s, t: told.append((s, t)))
        for step in steps:
            trackers.step(step, {"objective/kl": step / 2, "odd": float("nan")}, [])
        trackers.close()


def test_a_resume_continues_the_runs_and_no_failure_ends_them(two_attempts):
    session, told = two_attempts
    lines = [json.loads(x) for x in (session.trackers / "lines.jsonl").read_text().splitlines()]
    assert len({tuple(run) for run, *_ in lines}) == 1
    assert lines[0][0][:2] == ["films", "mine"]
    assert [first for _, first, *_ in lines] == ["config", 1, 2, 3, "end", 3, 4, "end"]
    assert lines[1][2]["objective/kl"] == 0.5
    problems = [text for _, text in told]
    assert problems.count("my_trackers:Broken did not take the metrics of step 1: no route") == 1
    # Ends failed after it had an id, so the second attempt does not pass the configuration again.
    assert problems.count("my_trackers:Ends cannot be started: no account") == 1
    assert len(problems) == 6  # three trackers with one each, in two attempts
    events = EventAccumulator(str(session.trackers / "mine"))
    events.Reload()
    assert [e.step for e in events.Scalars("objective/kl")] == [1, 2, 3, 3, 4]


@pytest.mark.parametrize("original", ["gone", "there"])
def test_a_session_that_was_moved_continues_its_runs_and_a_copy_begins_others(
    tmp_path, monkeypatch, original
):
    (tmp_path / "my_trackers.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = demo("log.trackers=['my_trackers:Lines']")
    session = create(tmp_path, "mine", config)
    other = SessionFolder(session.folder.with_name("other"))
    attempt(session, config)
    shutil.copytree(session.folder, other.folder)
    if original == "gone":
        shutil.rmtree(session.folder)
    for _ in range(2):
        attempt(other, config)
    lines = [json.loads(x) for x in (other.trackers / "lines.jsonl").read_text().splitlines()]
    first, *later = (run[2] for run, what, *_ in lines if what == "end")
    assert len(set(later)) == 1
    assert (later[0] == first) == (original == "gone")


def attempt(session, config):
    """One attempt of a run, without a step."""
    TrackerProcess(session, config, lambda _step, text: pytest.fail(text)).close()


def test_a_tracker_that_hangs_keeps_nothing_from_the_others_and_is_named_at_the_end(
    tmp_path, monkeypatch
):
    (tmp_path / "my_trackers.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "impatient.py").write_text(
        "from engine.train.reports import tracker_program\n"
        "tracker_program.FINISH_SECONDS = 1\n"
        "tracker_program.main()\n"
    )
    monkeypatch.setattr(reports, "PROGRAM", "impatient")
    config = demo("log.trackers=['my_trackers:Hangs', 'my_trackers:Lines']")
    session = create(tmp_path, "hangs", config)
    reported = []
    trackers = TrackerProcess(session, config, lambda _, text: reported.append(text))
    for step in (1, 2):
        trackers.step(step, {"objective/kl": 0.5}, [])
    file = session.trackers / "lines.jsonl"
    metrics = '2, {"objective/kl": 0.5}'
    until(lambda: file.exists() and metrics in file.read_text(), "metrics of step 2")
    trackers.close()
    assert reported == [
        "my_trackers:Hangs did not finish in time: the last steps may be missing there"
    ]


def test_a_tracker_that_prints_too_much_does_not_fill_the_disk(two_attempts):
    session, _ = two_attempts
    text = (session.trackers / "trackers.log").read_bytes()
    assert b"this is not a problem" in text
    assert b"left out" in text
    assert len(text) <= MAX_LOG


def test_trackers_that_take_nothing_are_ended_and_reported(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name, value in (("PROGRAM", "sleeper"), ("MAX_PENDING", 1), ("CLOSE_TIMEOUT", 0.1)):
        monkeypatch.setattr(reports, name, value)
    reported = []
    trackers = TrackerProcess(
        create(tmp_path, "hung", demo(*OVERRIDES)),
        demo(*OVERRIDES),
        lambda _, t: reported.append(t),
    )
    for step in (1, 2, 3, 4):  # more than the pipe and the queue hold
        trackers.step(step, {f"metric {i}": 0.5 for i in range(10_000)}, [])
    trackers.close()
    assert [text.partition(":")[0] for text in reported] == [
        "trackers are 1 steps behind",
        "trackers did not finish in time",
    ]
    assert not [p for p in psutil.Process().children() if "sleeper" in p.cmdline()]


def test_secrets_are_not_passed_on_and_files_are_the_owners(two_attempts):
    session, _ = two_attempts
    written = [file for file in session.trackers.rglob("*") if file.is_file()]
    assert not [file for file in written if b"s3cret" in file.read_bytes()]
    assert any(b"train.steps" in file.read_bytes() for file in written)
    assert stat.S_IMODE(session.trackers.stat().st_mode) == 0o700


def test_what_follows_a_question_mark_in_a_url_is_no_configuration():
    config = demo("reward={service: 'http://10.0.0.7/score?key=s3cret'}")
    assert "s3cret" not in json.dumps(shown_config(config))
    assert shown_config(config)["reward.service"] == "http://10.0.0.7/score"


def test_every_tracker_that_can_be_named_has_its_arguments():
    assert set(KINDS) == set(TRACKER_PACKAGES)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_each_tracker_of_accelerate_is_made_with_what_it_takes(name):
    """Without its package: the arguments are those of accelerate's class."""
    header = Header([name], "films", "mine", {})
    assert make_tracker(name, header, "")[0].name == name
    assert make_tracker(name, header, "an-id")[0].name == name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[wandbb]", r"log\.trackers\[0\] must be one of wandb, .* or module:Class"),
        ("[tensorboard, tensorboard]", "names tensorboard twice"),
        ("['absent_package.x:Tracker']", "absent_package.x:Tracker is not installed here"),
    ],
)
def test_a_tracker_that_does_not_exist_is_refused_before_the_start(names, message):
    with pytest.raises(ConfigError, match=message):
        check_inputs(demo(f"log.trackers={names}"))
