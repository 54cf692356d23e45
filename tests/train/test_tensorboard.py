"""TensorBoard event files, read with TensorBoard's own reader."""

import shutil
import stat
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import starter
from engine.config import file as config_file
from engine.protocol.rank_messages import Sample
from engine.train.reports.tensorboard import EventFiles


def unexpected(step, text):
    raise AssertionError(f"{text} at step {step}")


SECRETS = [
    "notify.command=send --as s3cret",
    "reward.model=null",
    "reward.service=http://10.0.0.7/score?key=s3cret",
    "eval.rewards=[{service: 'http://10.0.0.7/other?key=s3cret'}]",
]


@pytest.fixture
def events_of_two_attempts(tmp_path):
    """Events of five steps, a crash, and a resume from step 3 with other values."""
    config = config_file.load(starter.FOLDER / "demo.yaml", SECRETS)
    sample = Sample(
        index=0, prompt="<b>a|b", response="x\ny", score=1.0, kl=0.5, length=2, ended=True
    )
    first = EventFiles(tmp_path, 0, unexpected)
    first.hparams(config)
    for step in range(1, 6):
        first.step(step, {"objective/kl": float(step)}, [sample])
    second = EventFiles(tmp_path, 3, unexpected)
    for step in range(4, 8):
        second.step(step, {"objective/kl": 10.0 + step}, [])
    second.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    return events


def test_after_a_resume_each_step_appears_once_with_its_new_value(events_of_two_attempts):
    scalars = [(e.step, e.value) for e in events_of_two_attempts.Scalars("objective/kl")]
    assert scalars == [(1, 1), (2, 2), (3, 3), (4, 14), (5, 15), (6, 16), (7, 17)]


def test_the_folder_is_its_owners_alone(tmp_path):
    events = EventFiles(tmp_path / "tb", 0, unexpected)
    events.step(1, {"objective/kl": 1.0}, [])
    events.close()
    assert stat.S_IMODE((tmp_path / "tb").stat().st_mode) == 0o700


def test_replies_of_an_environment_are_marked(tmp_path):
    sample = Sample(
        index=0, prompt="p", response="one, why? two, so? three", score=1.0, kl=0.5, length=9,
        ended=True, replies=[(4, 10), (14, 19)],
    )  # fmt: skip
    events = EventFiles(tmp_path, 0, unexpected)
    events.step(1, {}, [sample])
    events.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    (tag,) = found.Tags()["tensors"]
    (text,) = found.Tensors(tag)[0].tensor_proto.string_val
    assert "| one,│ why? │two,│ so? │three |" in text.decode()


def test_responses_are_written_as_escaped_text(events_of_two_attempts):
    tag = next(t for t in events_of_two_attempts.Tags()["tensors"] if t.startswith("samples"))
    text = events_of_two_attempts.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "&lt;b&gt;a&#124;b" in text
    assert "x<br>y" in text


def test_secrets_of_a_command_or_of_a_query_are_not_written(events_of_two_attempts, tmp_path):
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"train.steps" in data
    assert b"s3cret" not in data


def test_the_configuration_is_written_as_hparams_and_adds_no_scalar(events_of_two_attempts):
    assert "_hparams_/experiment" in events_of_two_attempts.summary_metadata
    assert events_of_two_attempts.Tags()["scalars"] == ["objective/kl"]


@pytest.fixture
def uncaught(monkeypatch):
    """The exceptions of threads of which Python prints a traceback."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", lambda raised: printed.append(raised.exc_value))
    return printed


def test_files_that_cannot_be_written_are_reported_once_and_a_new_one_follows(tmp_path, uncaught):
    told = []
    folder = tmp_path / "tb"
    events = EventFiles(folder, 0, lambda step, text: told.append(step), retry_seconds=0.0)
    events.step(1, {"objective/kl": 1.0}, [])
    shutil.rmtree(folder)
    folder.touch()
    events.step(2, {"objective/kl": 2.0}, [])
    events.step(3, {"objective/kl": 3.0}, [])
    assert told == [2]
    assert uncaught == []
    folder.unlink()
    events.step(4, {"objective/kl": 4.0}, [])
    events.close()
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("objective/kl")] == [(4, 4)]


def test_an_error_of_another_thread_is_still_printed(tmp_path, uncaught):
    EventFiles(tmp_path, 0, unexpected).step(1, {"objective/kl": 1.0}, [])
    other = threading.Thread(target=(tmp_path / "absent").read_text)
    other.start()
    other.join()
    assert [type(error) for error in uncaught] == [FileNotFoundError]


def test_an_attempt_whose_first_steps_could_not_be_written_leaves_none_of_the_one_before(tmp_path):
    folder, away = tmp_path / "tb", tmp_path / "away"
    first = EventFiles(folder, 0, unexpected)
    for step in range(1, 6):
        first.step(step, {"objective/kl": float(step)}, [])
    first.close()
    folder.rename(away)
    folder.touch()
    second = EventFiles(folder, 3, lambda _step, _text: None, retry_seconds=0.0)
    second.step(4, {"objective/kl": 14.0}, [])
    folder.unlink()
    away.rename(folder)
    second.step(5, {"objective/kl": 15.0}, [])
    second.close()
    found = EventAccumulator(str(folder))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("objective/kl")] == [
        (1, 1), (2, 2), (3, 3), (5, 15),
    ]  # fmt: skip
