"""How commands choose a checkpoint: by its step, or as the last or the best one."""

import contextlib

import pytest
from click.testing import CliRunner

from engine.journal.writer import JournalWriter
from engine.protocol.rank_messages import StepReport
from engine.session.folder import create
from rlhf_tui.cli import cli
from tests.tui.conftest import config_of


def test_a_fork_of_a_session_without_a_checkpoint_is_refused(session_maker, tmp_path):
    session_maker(tmp_path / "s", "young", 3)
    found = CliRunner().invoke(
        cli, ["fork", "young", "--name", "new", "--detach", "--sessions", str(tmp_path / "s")]
    )
    assert str(found.exception) == "session 'young' has no checkpoint yet"


def test_no_checkpoint_of_a_live_session_is_chosen_for_a_resume(session_maker, tmp_path):
    lock = session_maker(tmp_path / "s", "young", 3).acquire()
    sessions = ["--sessions", str(tmp_path / "s")]
    found = CliRunner().invoke(cli, ["resume", "young", "--from", "last", *sessions])
    assert "session 'young' already has an engine" in str(found.exception)
    lock.release()


CHOOSES_A_CHECKPOINT = (
    ("export", "run", "--policy", "to", "--step"),
    ("eval", "run", "-o", "eval.prompts=held-out.jsonl", "--step"),
    ("fork", "run", "--name", "new", "--from"),
    ("resume", "run", "--from"),
    ("ctl", "run", "rollback"),
)


@pytest.fixture
def saved(tmp_path):
    """A session with checkpoints of steps 1 and 3, of which the first has the best score."""
    session = create(tmp_path / "s", "run", config_of())
    with contextlib.closing(JournalWriter(session)) as journal:
        journal.begin_attempt(0, fresh=False)
        for step, score in ((1, 2.0), (2, 3.0), (3, 1.0)):
            metrics = {"objective/scores": score}
            journal.record_step(StepReport(step=step, metrics=metrics, samples=[], settings={}))
            if step != 2:
                journal.checkpoints.record(step, 1000, score, 0.0)
                journal.checkpoints.complete(step)
                policy = session.checkpoints / f"step-{step:06d}" / "policy"
                policy.mkdir(parents=True)
                (policy.parent / "state.json").write_text('{"hashes": {}}')
                (policy.parent / "COMPLETE").touch()
    return session


@pytest.mark.parametrize(
    ("choice", "step"), [("1", 1), ("last", 3), ("best", 1), (None, 3)], ids=str
)
def test_a_checkpoint_is_chosen_by_its_step_or_as_the_last_or_the_best_one(
    saved, tmp_path, choice, step
):
    arguments = ["--policy", str(tmp_path / "to"), "--sessions", str(saved.folder.parent)]
    chosen = [] if choice is None else ["--step", choice]
    found = CliRunner().invoke(cli, ["export", "run", *arguments, *chosen])
    assert found.output.startswith(f"the policy of step {step} is in")


@pytest.mark.parametrize("command", CHOOSES_A_CHECKPOINT[:4], ids=lambda words: words[0])
def test_a_missing_checkpoint_has_the_exit_code_of_what_does_not_exist(saved, command):
    sessions = ["--sessions", str(saved.folder.parent)]
    found = CliRunner().invoke(cli, [*command, "2", *sessions])
    assert found.exception.exit_code == 3
    assert "no checkpoint of step 2" in str(found.exception)
    assert "(it has: 1, 3)" in str(found.exception)


@pytest.mark.parametrize("command", CHOOSES_A_CHECKPOINT, ids=lambda words: words[0])
def test_all_commands_take_the_same_words_for_a_checkpoint(session_maker, tmp_path, command):
    session_maker(tmp_path / "s", "run", 3)
    sessions = ["--sessions", str(tmp_path / "s")]
    for word, answer in (
        ("last", "session 'run' has no checkpoint yet"),
        ("best", "no checkpoint of session 'run' has objective/scores"),
    ):
        assert str(CliRunner().invoke(cli, [*command, word, *sessions]).exception) == answer
    for word in ("first", "0", "-1", "1.5"):
        found = CliRunner().invoke(cli, [*command, word, *sessions])
        assert found.exit_code == 2
        assert word == "-1" or "give a number from 1 on, last or best" in found.output
