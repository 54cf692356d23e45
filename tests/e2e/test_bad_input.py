"""Invalid input: exit code 2, one line that names the key or file, and no incomplete session."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import starter


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
        ("ppo.clip_range=1.5", "ppo.clip_range", "< 1"),
        ("kl.beta=-1", "kl.beta", ">= 0"),
        ("kl.beta=.inf", "kl.beta", "finite"),
        ("kl.controller=loose", "kl.controller", "adaptive, fixed"),
        ("rollout.batch_size=6", "rollout.batch_size", "a multiple of"),
        ("data.prompts=nowhere.jsonl", "data.prompts", "no file at"),
        ("data.prompts=2020-13-45", "data.prompts", "month"),
        ("kl.beta=[1", "kl.beta", "line 1"),
        ("kl.beta", "kl.beta", "key=value"),
        ("reward.model=./nowhere", "reward.model", "does not exist"),
        ("model.policy=/", "model.policy", "config.json"),
        ("rollout.max_new_tokens=300", "rollout.max_new_tokens", "at most"),
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
        ("model: {policy: x}\n", "'data' is missing"),
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


@pytest.mark.parametrize("name", ["../escaped", "a/b", "..", ".hidden", "", "x" * 81, "a b"])
def test_an_invalid_session_name_is_refused(lab, name):
    done = lab.cli("demo", "--headless", "--name", name)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not list(lab.root.parent.glob("escaped*"))
    for command in ("status", "rm", "logs"):
        assert lab.cli(command, name).returncode == 2


def test_an_existing_name_is_refused_and_its_session_is_kept(lab, whole):
    done = lab.cli("demo", "--headless", "--name", whole.name)
    assert done.returncode == 2
    assert "resume" in done.stderr
    assert whole.state == "finished"


def test_an_invalid_option_is_one_line_too(lab):
    for arguments in (("demo", "--steps", "none"), ("fly",), ("metrics",), ("ls", "--loud")):
        done = lab.cli(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def late(lab, place):
    """Errors that only a rank can detect, run in parallel; the error line of each by name."""
    files = place / "late"
    files.mkdir()
    (files / "other.jsonl").write_text(json.dumps({"question": "why?"}) + "\n")
    (files / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    empty = files / "empty-model"
    empty.mkdir()
    (empty / "config.json").write_text((starter.FOLDER / "policy" / "config.json").read_text())
    function = ["-o", "reward.model=null", "-o"]
    attempts = {
        "column": ["-o", f"data.prompts={files / 'other.jsonl'}"],
        "broken": ["-o", f"data.prompts={files / 'broken.jsonl'}"],
        "model": ["-o", f"model.policy={empty}"],
        "import": [*function, "reward.function=not_there:score"],
        "function": [*function, "reward.function=json:not_there", "--detach"],
    }

    def attempt(name):
        mode = [] if "--detach" in attempts[name] else ["--headless"]
        return refused(lab, name, "demo", "--name", name, *attempts[name], *mode)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(attempts, pool.map(attempt, attempts), strict=True))


def test_a_missing_column_is_named_with_the_existing_ones(late):
    assert "data.column" in late["column"]
    assert "question" in late["column"]


def test_a_prompt_file_that_cannot_be_parsed_is_named(late):
    assert "broken.jsonl" in late["broken"]


def test_a_model_folder_that_holds_no_model_is_named(late):
    assert "model.policy" in late["model"]
    assert "empty-model" in late["model"]


def test_a_reward_function_that_cannot_be_imported_is_named(late):
    assert "reward.function" in late["import"]
    assert "not_there" in late["import"]


def test_a_reward_function_missing_in_its_module_is_named_in_a_detached_run_too(late):
    assert "reward.function" in late["function"]
    assert "not_there" in late["function"]


@pytest.fixture(scope="module", params=[("nan", "finite"), ("short", "one for each")])
def odd_reward(request, lab):
    """A run whose reward function returns invalid scores in the second step."""
    score, reason = request.param
    run = lab.run(f"odd-{score}")
    run.score_at(2, score)
    done = lab.cli(*run.arguments, "--headless")
    yield run, reason, done
    run.end()


def test_invalid_scores_end_the_run_with_a_clear_error(odd_reward):
    run, reason, done = odd_reward
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert reason in last
    assert "step 2" in last
    assert run.state == "failed"


def test_the_error_and_its_traceback_are_in_the_journal(odd_reward):
    run, reason, _ = odd_reward
    (error,) = run.events("error")
    assert reason in error["text"]
    assert "Traceback" in error["traceback"]


def test_the_failed_step_is_not_recorded(odd_reward):
    run, _, _ = odd_reward
    assert [row["step"] for row in run.numbers()] == [1]
    assert Path(run.session.folder).is_dir()
