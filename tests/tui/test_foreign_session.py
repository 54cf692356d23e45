"""What a session names is not run for another user than its owner, whichever command would."""

import os
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from engine.errors import SessionError
from engine.session.checkpoints import checkpoint_path, mark_complete
from rlhf_tui.cli import cli


@pytest.fixture
def foreign(session_maker, tmp_path):
    """A session of another user, whose alerts run a command; that writes the file `ran`."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    session = session_maker(tmp_path / "s", "theirs", 3)
    config = session.config()
    session.write_config(
        msgspec.structs.replace(
            config,
            notify=msgspec.structs.replace(config.notify, command=f"touch {tmp_path / 'ran'}"),
            lora=msgspec.structs.replace(config.lora, rank=4),
        )
    )
    checkpoint = checkpoint_path(session.checkpoints, 3)
    (checkpoint / "policy").mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"hashes": {}}')
    mark_complete(checkpoint)
    os.chown(session.folder, 65534, -1)
    return session


@pytest.mark.parametrize(
    "words",
    [
        ["notify", "test", "theirs"],
        ["eval", "theirs", "-o", "eval.prompts=starter:prompts"],
        ["export", "theirs", "--step", "3", "--merged", "--policy", "out"],
        ["reward", "train", "theirs", "-o", "out"],
    ],
)
def test_a_command_that_runs_what_the_configuration_names_refuses_it(
    foreign, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, [*words, "--sessions", str(foreign.folder.parent)])
    assert isinstance(done.exception, SessionError)
    assert "belongs to" in str(done.exception)
    assert {path.name for path in Path().iterdir()} <= {"s", "state"}


def test_its_policy_can_be_copied(foreign, tmp_path):
    words = ["export", "theirs", "--step", "3", "--policy", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*words, "--sessions", str(foreign.folder.parent)])
    assert done.exit_code == 0
