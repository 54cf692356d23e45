"""Where a resume starts from, what it changes, and what refuses a start."""

import json
import shutil
import sys

import msgspec
import pytest

from engine import starter
from engine.config import file as config_file
from engine.config.sections.ppo import KLConfig
from engine.config.settings import SettingChange
from engine.errors import (
    ConfigError,
    DamagedCheckpointError,
    NoSuchSessionError,
    SessionError,
    SessionLockedError,
    UserInputError,
)
from engine.journal.reader import JournalReader
from engine.launch import delete_checkpoint
from engine.launch.failed_start import NewSession
from engine.launch.inputs import check_files, check_inputs
from engine.launch.start import fork, forked_config, resume
from engine.launch.start_checkpoints import (
    adopted_checkpoint,
    checkpoint_steps,
    last_checkpoint,
    timeline_checkpoints,
)
from engine.launch.start_options import StartOptions
from engine.protocol.commands import DeleteCheckpoint
from engine.session.checkpoints import checkpoint_path
from engine.supervisor.serve import supervise


def test_a_run_resumes_from_the_last_complete_checkpoint_of_its_timeline(writer):
    for step in (2, 4, 6):
        writer.checkpoint(step)
    assert last_checkpoint(writer.session) == 6
    (writer.session.checkpoints / "step-000006" / "COMPLETE").unlink()
    assert last_checkpoint(writer.session) == 4
    writer.journal.begin_attempt(2, fresh=True)
    assert last_checkpoint(writer.session) == 2
    assert checkpoint_steps(writer.session) == [2, 4]


def test_a_checkpoint_of_an_abandoned_timeline_cannot_be_resumed_from(writer):
    # It would leave a gap: the steps up to it are not this timeline's.
    for step in (2, 4):
        writer.checkpoint(step)
    writer.journal.begin_attempt(2, fresh=True)
    given = {"from_step": 4, "reseed": False, "overrides": [], "who": "me"}
    for going_on in (
        lambda: resume(writer.session, **given),
        lambda: fork(writer.session, "child", **given),
    ):
        with pytest.raises(NoSuchSessionError, match=r"it has: 2\)"):
            going_on()
    assert timeline_checkpoints(writer.session) == [2]


def test_a_resume_does_not_start_over_while_none_of_the_recorded_checkpoints_is_there(writer):
    """As on a disk that is not mounted. Later, it continues from the last one."""
    writer.steps(1, 2, 3, 4)
    for step in (2, 4):
        writer.checkpoint(step)
    writer.journal.set_meta(state="stopped")
    given = {"from_step": None, "reseed": False, "overrides": [], "who": "me"}
    writer.session.checkpoints.rename(writer.session.folder / "away")
    with pytest.raises(UserInputError, match=r"of steps 2, 4.*none of them.*not mounted"):
        resume(writer.session, **given)
    (writer.session.folder / "away").rename(writer.session.checkpoints)
    assert resume(writer.session, **given).from_step == 4


def test_a_checkpoint_that_a_restored_journal_lacks_can_be_resumed_from_by_its_step(writer):
    writer.checkpoint(2)
    copied = checkpoint_path(writer.session.checkpoints, 4)
    shutil.copytree(checkpoint_path(writer.session.checkpoints, 2), copied)
    assert last_checkpoint(writer.session) == 2
    start = resume(writer.session, from_step=4, reseed=False, overrides=[], who="me")
    adopted = adopted_checkpoint(writer.session, start.from_step)
    writer.journal.begin_attempt(start.from_step, fresh=True, adopt=adopted)
    assert timeline_checkpoints(writer.session) == [2, 4]


def test_a_checkpoint_whose_end_was_not_recorded_counts_until_its_timeline_is_abandoned(
    writer,
):
    writer.checkpoint(2)
    writer.journal.checkpoints.record(4, 1000, 0.5, 1.5)
    (writer.session.checkpoints / "step-000004").mkdir()
    (writer.session.checkpoints / "step-000004" / "COMPLETE").touch()
    assert last_checkpoint(writer.session) == 4
    writer.journal.begin_attempt(2, fresh=True)
    assert last_checkpoint(writer.session) == 2


@pytest.fixture
def without_journal(make_session, write_in):
    """A session with two complete checkpoints whose journal is lost."""
    session = make_session()
    before = write_in(session)
    before.journal.begin_attempt(0, fresh=False)
    for step in (4, 8):
        before.checkpoint(step)
    before.journal.close()
    for file in (session.journal_file, session.samples_file):
        file.unlink()
    return session


@pytest.mark.parametrize("problem", ["is missing", "is empty"])
def test_a_resume_without_a_journal_does_not_start_over_from_step_0(without_journal, problem):
    if problem == "is empty":
        without_journal.journal_file.touch()
    # What is to be typed names the folder of sessions: it is not the default one.
    typed = f"resume run --from 8 --sessions {without_journal.folder.parent}$"
    with pytest.raises(UserInputError, match=rf"journal\.db {problem};.*{typed}"):
        resume(without_journal, from_step=None, reseed=False, overrides=[], who="me")


def test_a_resume_from_a_damaged_checkpoint_is_refused_before_it_abandons_steps(writer):
    writer.steps(1, 2, 3, 4)
    for step in (2, 4):
        writer.checkpoint(step)
    (writer.session.checkpoints / "step-000002" / "state.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match="nothing was changed"):
        resume(writer.session, from_step=2, reseed=False, overrides=[], who="me")


@pytest.mark.parametrize("from_step", [None, 2])
async def test_a_resume_is_refused_if_another_engine_ran_since_its_checkpoint_was_chosen(
    make_session, write_in, from_step
):
    session = make_session()
    first = write_in(session)
    first.journal.begin_attempt(0, fresh=False)
    first.steps(1, 2)
    first.checkpoint(2)
    first.journal.close()
    given = {"reseed": False, "overrides": ["train.steps=7"], "who": "me"}
    start = resume(session, from_step=from_step, **given)
    other = write_in(session)
    other.journal.begin_attempt(2, fresh=False)
    other.steps(3, 4)
    other.checkpoint(4)
    other.journal.close()
    before = session.config_file.read_text()
    with pytest.raises(SessionError, match="another engine has run session 'run' since"):
        await supervise(session, start)
    with JournalReader(session) as reader:
        assert (len(reader.attempts()), reader.last_step()) == (2, 4)
    assert session.config_file.read_text() == before


@pytest.mark.parametrize("killed", [False, True])
async def test_a_resume_is_refused_if_its_checkpoint_was_deleted_since_it_was_chosen(
    make_session, write_in, monkeypatch, killed
):
    session = make_session()
    writer = write_in(session)
    writer.journal.begin_attempt(0, fresh=False)
    writer.steps(1, 2, 3, 4)
    for step in (2, 4):
        writer.checkpoint(step)
    writer.journal.close()
    start = resume(session, from_step=2, reseed=False, overrides=["train.steps=7"], who="me")
    if killed:  # before it removed the files
        monkeypatch.setattr(delete_checkpoint, "remove", lambda _folder: None)
    delete_checkpoint.delete_checkpoint(session, 2, "ana")
    before = session.config_file.read_text()
    with pytest.raises(SessionError, match=r"step 2 of session 'run' was deleted .*it has: 4"):
        await supervise(session, start)
    with JournalReader(session) as reader:
        assert (len(reader.attempts()), reader.last_step()) == (1, 4)
    assert timeline_checkpoints(session) == [4]
    assert session.config_file.read_text() == before


async def test_the_checkpoint_of_a_resume_is_not_deleted_before_its_attempt_has_begun(
    engine, writer
):
    writer.steps(1, 2, 3, 4)
    for step in (2, 4):
        writer.checkpoint(step)
    engine.shared.next = StartOptions(from_step=2, fresh=True)
    reply = engine.send(DeleteCheckpoint(step=2))
    assert (reply.status, "a resume continues from" in reply.reason) == ("rejected", True)


def test_a_resume_chooses_nothing_while_the_session_has_an_engine(writer):
    lock = writer.session.acquire()
    with pytest.raises(SessionLockedError):
        resume(writer.session, from_step=None, reseed=False, overrides=[], who="me")
    lock.release()


def test_a_session_whose_journal_is_lost_is_not_new(without_journal):
    # A new one is removed when its configuration turns out to be wrong.
    resumed = NewSession(without_journal, StartOptions(from_step=8))
    assert not resumed.remove_if_unused(UserInputError.exit_code)


def test_a_chosen_checkpoint_can_be_resumed_from_without_a_journal(without_journal, write_in):
    state_file = without_journal.checkpoints / "step-000008" / "state.json"
    state_file.write_text('{"score": 0.5, "hashes": {}}')
    start = resume(without_journal, from_step=8, reseed=False, overrides=[], who="me")
    assert (start.from_step, start.fresh) == (8, True)
    new = write_in(without_journal)
    adopted = adopted_checkpoint(without_journal, 8)
    new.journal.begin_attempt(8, fresh=True, adopt=adopted)
    # An attempt that fails before its first save starts again from there.
    assert last_checkpoint(without_journal) == 8
    assert new.journal.checkpoints.steps() == [8]
    with JournalReader(without_journal) as reader:
        assert [(c.step, c.score) for c in reader.checkpoints()] == [(8, 0.5)]
    assert adopted_checkpoint(without_journal, 8) is None
    new.journal.close()


def test_who_is_to_sample_anew_does_so_until_a_checkpoint_knows_of_it(writer):
    journal = writer.journal
    journal.begin_attempt(4, fresh=True, reseed=True)
    anew = journal.attempt
    journal.begin_attempt(4, fresh=False)  # it crashed before the next save
    assert journal.reseeded(4) == anew
    journal.begin_attempt(8, fresh=False)
    assert (journal.reseeded(8), journal.reseeded(4)) == (0, anew)
    journal.begin_attempt(2, fresh=False)  # what was saved at 4 is gone, and with it the wish
    assert journal.reseeded(4) == 0
    journal.begin_attempt(4, fresh=True, reseed=True)
    journal.begin_attempt(4, fresh=True)
    assert journal.reseeded(4) == 0


def test_overrides_that_are_settings_are_changes_from_the_next_step_on(writer):
    start = resume(
        writer.session,
        from_step=None,
        reseed=False,
        overrides=["kl.beta=0.7", "train.steps=999"],
        who="me",
    )
    assert [(c.key, c.new) for c in start.changes] == [("beta", 0.7)]


def test_an_override_of_a_whole_section_is_a_change_of_each_setting_in_it(writer):
    overrides = ["kl={beta: 0.7, controller: adaptive}"]
    start = resume(writer.session, from_step=None, reseed=False, overrides=overrides, who="me")
    changed = {c.key: c.new for c in start.changes}
    defaults = msgspec.structs.asdict(KLConfig())
    keys = ("target", "horizon", "beta_min", "beta_max")
    given = {"beta": 0.7, "controller": "adaptive"}
    assert changed == given | {key: defaults[key] for key in keys}
    assert not start.fresh


@pytest.mark.parametrize("action", ["fork", "resume"])
def test_the_old_value_of_an_override_is_that_of_the_checkpoint(writer, action):
    writer.steps(1, 2, 3)
    writer.checkpoint(2)
    writer.journal.set_meta(settings={"beta": 0.1})  # of step 4
    state = {"state": {"settings": {"beta": 0.25}}, "score": 0.5, "kl": 1.5, "hashes": {}}
    folder = writer.session.checkpoints / "step-000002"
    (folder / "state.json").write_text(json.dumps(state))
    given = {"reseed": False, "overrides": ["kl.beta=0.3"], "who": "me"}
    if action == "fork":
        start = fork(writer.session, "child", from_step=2, **given)[1]
    else:
        start = resume(writer.session, from_step=2, **given)
    assert start.changes == [SettingChange(key="beta", old=0.25, new=0.3)]
    latest = resume(writer.session, from_step=None, **given)
    assert latest.changes == [SettingChange(key="beta", old=0.1, new=0.3)]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.prompts=/nowhere/p.jsonl", "data.prompts: no file at"),
        ("model.policy=/nowhere", "model.policy: the folder /nowhere does not exist"),
        ("reward.model=/", "reward.model: the folder / holds no config.json"),
        (f"model.policy={__file__}", f"model.policy: {__file__} is a file"),
        ("eval={every: 1, prompts: /nowhere/p.jsonl}", "eval.prompts: no file at"),
    ],
)
def test_what_is_missing_is_an_error_before_anything_is_made(override, says):
    with pytest.raises(ConfigError, match=says):
        check_inputs(config_file.load(starter.FOLDER / "demo.yaml", [override]))


@pytest.mark.parametrize(
    ("overrides", "package", "says"),
    [
        (
            ["model.attn_implementation=flash_attention_2", "model.dtype=bfloat16"],
            "flash_attn",
            "flash_attention_2 needs a GPU and the package flash-attn: pip install flash-attn",
        ),
        (["model.kernels=liger"], "liger_kernel", "liger needs a GPU and the package liger-kernel"),
        (["lora={rank: 4, quantise: nf4}"], "bitsandbytes", "nf4 needs the package bitsandbytes"),
    ],
)
def test_a_package_that_is_not_installed_is_an_error_before_anything_is_made(
    monkeypatch, overrides, package, says
):
    for name in (package, "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    with pytest.raises(ConfigError, match=says):
        check_inputs(config)
    check_files(config)


def test_forms_start_no_python_and_a_start_does(writer):
    engine = ["rollout.engine=vllm", "rollout.python=/nowhere/python"]
    config = config_file.load(starter.FOLDER / "demo.yaml", engine)
    check_inputs(config)
    forked_config(config, ["kl.beta=0.3"])
    writer.session.config_file.write_text(config_file.dump(config))
    writer.checkpoint(2)
    given = {"reseed": False, "overrides": [], "who": "me"}
    for start in (
        lambda: resume(writer.session, from_step=None, **given),
        lambda: fork(writer.session, "child", from_step=2, **given),
    ):
        with pytest.raises(
            UserInputError, match=r"^rollout\.python: /nowhere/python cannot be run"
        ):
            start()
    assert not writer.session.folder.with_name("child").exists()
