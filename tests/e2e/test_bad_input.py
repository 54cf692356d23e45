"""Invalid input: exit code 2, one line that names the key or file, and no incomplete session."""

import json

import pytest


def refused(lab, name, *arguments):
    """Runs a command that must fail with exit code 2; returns its one line on stderr."""
    done = lab.cli(*arguments)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("session ")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("rlhf-tui: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert not (lab.root / name).exists(), "an incomplete session was left behind"
    return lines[0]


@pytest.mark.parametrize(
    ("override", "named", "remedy"),
    [
        ("ppo.epocs=2", "ppo.epocs", "ppo.epochs"),
        ("ppo.epochs=two", "ppo.epochs", "a whole number"),
        ("ppo.clip_range=1.5", "ppo.clip_range", "at most 1"),
        ("kl.beta=-1", "kl.beta", "at least 0"),
        ("kl.beta=.inf", "kl.beta", "finite"),
        ("kl.controller=loose", "kl.controller", "adaptive, fixed"),
        ("rollout.batch_size=6", "rollout.batch_size", "a multiple of"),
        ("data.prompts=nowhere.jsonl", "data.prompts", "no file at"),
        ("data.prompts=2020-13-45", "data.prompts", "month"),
        ("kl.beta=[1", "kl.beta", "line 1"),
        ("kl.beta", "kl.beta", "key=value"),
        ("reward.model=./nowhere", "reward.model", "does not exist"),
        ("model.policy=/", "model.policy", "config.json"),
        ("reward.function=a:b", "reward.function", "exactly one"),
        ("guardrails.rules=[{name: a, metric: b}]", "rules 'a'", "needs one of"),
    ],
)
def test_a_wrong_key_type_value_or_file_is_named_with_the_remedy(lab, override, named, remedy):
    options = ("-o", "ppo.minibatches=4", "-o", override)
    line = refused(lab, "never", "demo", "--headless", "--name", "never", *options)
    assert named in line
    assert remedy in line


def test_an_empty_prompt_file_is_named(lab, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    option = f"data.prompts={empty}"
    line = refused(lab, "never", "demo", "--headless", "--name", "never", "-o", option)
    assert str(empty) in line
    assert "at least one prompt" in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {policy: x}\n", "the section 'data' is required, but missing"),
        ("just words\n", "must contain sections"),
        ("model: [\n", "line 2"),
        ("", "must contain sections"),
        ("model: {policy: x}\nmodle: {}\n", "modle"),
    ],
)
def test_an_invalid_configuration_file_is_named(lab, tmp_path, text, named):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    assert named in refused(lab, "run", "run", config, "--headless")


def test_a_missing_configuration_file_is_named(lab, tmp_path):
    assert "no.yaml" in refused(lab, "no", "run", tmp_path / "no.yaml", "--headless")
    assert str(tmp_path) in refused(lab, "x", "run", tmp_path, "--headless")


@pytest.mark.parametrize("name", ["../escaped", "", "a b"])
def test_an_invalid_session_name_is_refused(lab, name):
    done = lab.cli("demo", "--headless", "--name", name)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not list(lab.root.parent.glob("escaped*"))


@pytest.mark.parametrize("command", ["status", "rm", "logs"])
def test_an_invalid_session_name_is_refused_by_every_command(lab, command):
    assert lab.cli(command, "../escaped").returncode == 2


def test_an_existing_name_is_refused_and_its_session_is_kept(lab, whole):
    done = lab.cli("demo", "--headless", "--name", whole.name)
    assert done.returncode == 2
    assert "resume" in done.stderr
    assert whole.state == "finished"


def test_a_run_is_either_in_the_foreground_or_in_the_background(lab):
    done = lab.cli("demo", "--name", "both", "--headless", "--detach")
    assert done.returncode == 2
    assert "give one of --headless" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (lab.root / "both").exists()


def test_an_invalid_option_is_one_line_too(lab):
    for arguments in (("demo", "--steps", "none"), ("fly",), ("verify",), ("ls", "--loud")):
        done = lab.cli(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


# Errors that only a rank can detect; tests of the ranks' modules hold the other ones.


def test_a_reward_function_missing_in_its_module_is_named_in_a_detached_run_too(lab):
    options = ("-o", "reward.model=null", "-o", "reward.function=json:not_there", "--detach")
    line = refused(lab, "function", "demo", "--name", "function", *options)
    assert "reward.function" in line
    assert "not_there" in line


@pytest.mark.slow
def test_a_missing_column_is_named_with_the_existing_ones(lab, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "why?"}) + "\n")
    option = f"data.prompts={tmp_path / 'other.jsonl'}"
    line = refused(lab, "column", "demo", "--name", "column", "-o", option, "--headless")
    assert "data.column" in line
    assert "question" in line


def test_an_error_in_a_step_ends_the_run_with_a_clear_error(branch):
    first, *_, last = branch.warned.splitlines()
    assert first.startswith("session branch: forked from step 4 of whole; folder ")
    assert "no more" in last
    assert "Traceback" not in branch.warned
    assert branch.ended == "failed"


def test_the_error_and_its_traceback_are_in_the_journal(branch):
    (error,) = branch.events("error")
    assert "no more" in error["text"]
    assert "Traceback" in error["traceback"]


def test_the_failed_step_is_not_recorded(branch):
    assert [row["step"] for row in branch.numbers()] == list(range(1, 9))
