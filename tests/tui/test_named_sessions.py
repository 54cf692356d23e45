"""Which session a command means: by its name, or as the only live one."""

import json

import pytest
from click.testing import CliRunner

from engine.errors import NoSuchSessionError, UserInputError
from engine.session.registry import announce
from rlhf_tui.cli import cli

READING = ["status", "metrics", "samples", "events", "logs"]


def run(*words):
    return CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)


@pytest.fixture
def live(session_maker, tmp_path, monkeypatch):
    """Makes sessions that look live, in any folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path / "here"))
    locks = []

    def make(folder, name):
        session = session_maker(tmp_path / folder, name, 3)
        locks.append(session.acquire())
        announce(session)
        return session

    yield make
    for lock in locks:
        lock.release()


@pytest.mark.parametrize(
    "words",
    [*([verb, "far"] for verb in READING), ["ctl", "far", "pause"], ["note", "far", "seen"],
     ["rm", "far", "-y"], ["export", "far"], ["replay", "far"], ["verify", "far"]],
)  # fmt: skip
def test_a_name_means_no_session_of_another_folder_than_the_given_one(live, tmp_path, words):
    live("there", "far")
    failed = run(*words, "--sessions", tmp_path / "here")
    assert isinstance(failed.exception, NoSuchSessionError)


def test_a_session_of_another_folder_is_deleted_only_if_that_folder_is_given(live, tmp_path):
    """It would be, if its engine ended between the search for live ones and the deletion."""
    far = live("there", "far")
    failed = run("rm", "far", "-y")
    assert isinstance(failed.exception, NoSuchSessionError)
    assert str(failed.exception).endswith(f"rm far --sessions {tmp_path / 'there'}")
    assert far.config_file.is_file()


def test_the_list_of_a_given_folder_has_no_session_of_another(live, tmp_path):
    live("there", "far")
    live("here", "near")
    listed = [row["name"] for row in json.loads(run("ls", "--json").output)]
    assert listed == ["near", "far"]
    given = run("ls", "--json", "--sessions", tmp_path / "here").output
    assert [row["name"] for row in json.loads(given)] == ["near"]


@pytest.mark.parametrize("verb", READING)
def test_what_reads_a_session_reads_the_only_live_one_and_says_which(live, tmp_path, verb):
    live("there", "far")
    named, unnamed = run(verb, "far"), run(verb)
    assert unnamed.exit_code == 0
    assert unnamed.stdout == named.stdout
    assert unnamed.stderr == f"rlhf-tui: session far in {tmp_path / 'there'}\n"


def test_of_several_live_sessions_none_is_chosen(live):
    live("here", "one")
    live("here", "two")
    failed = run("status")
    assert isinstance(failed.exception, UserInputError)
    assert str(failed.exception) == "several sessions are live, give one: one, two"


def test_without_a_live_session_a_name_is_asked_for(live, session_maker, tmp_path):
    session_maker(tmp_path / "here", "ended", 3)
    failed = run("metrics")
    assert isinstance(failed.exception, NoSuchSessionError)
    assert "give the name of a finished one" in str(failed.exception)
