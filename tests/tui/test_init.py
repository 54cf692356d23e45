"""The first configuration of a new user, which init writes."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from click import UsageError
from click.testing import CliRunner

from engine import starter
from engine.config import file as config_file
from engine.config.recipes import RECIPES
from engine.errors import RlhfError
from engine.kl import largest_change
from rlhf_tui.commands import init as init_module
from rlhf_tui.commands.init import init

EXAMPLES = Path(__file__).parents[2] / "examples"
NO_RECIPES = {
    "calculator", "editor", "gdpo", "hub", "operating", "own_reward", "programs", "smollm2",
    "tools", "word_problems",
}  # fmt: skip
"""Examples of models, rewards and environments, or of a way to train with several rewards."""


def write(*arguments):
    done = CliRunner().invoke(init, [str(a) for a in arguments])
    if isinstance(done.exception, RlhfError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_the_recipes_in_the_package_are_the_examples():
    examples = {path.stem: path for path in EXAMPLES.glob("*.yaml")}
    examples = {k: v for k, v in examples.items() if k not in NO_RECIPES}
    examples["ppo"] = starter.FOLDER / "demo.yaml"
    assert RECIPES.keys() == examples.keys()
    for name, path in examples.items():
        assert RECIPES[name].file.read_bytes() == path.read_bytes(), f"{name}: run make docs"


def test_an_override_with_another_reward_takes_the_place_of_the_starter_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "game.py").write_text("class Game: ...\n")
    file = tmp_path / "run.yaml"
    keys = ("environment.factory=game:Game", "reward.environment=score")
    write(file, *(word for key in keys for word in ("-o", key)))
    reward = config_file.load(file).reward
    assert (reward.environment, reward.model) == ("score", None)
    for name, answer in (("prompts", "starter:prompts"), ("policy", "starter:policy")):
        assert init_module.checked_answer(name, keys, answer) == answer


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("policy", "?", "'?' is neither an existing folder nor an id on the hub"),
        ("policy", "models/sft/last", "'models/sft/last' is neither an existing folder nor"),
        ("policy", "starter:model", "there is no 'starter:model', but starter:policy"),
        ("reward_model", "a reward", "'a reward' is neither an existing folder nor"),
        ("prompts", "my prompts", "'my prompts' is neither an existing file or folder nor"),
    ],
)
def test_an_answer_that_no_model_or_data_set_can_be_is_asked_for_again(name, answer, says):
    with pytest.raises(UsageError) as caught:
        init_module.checked_answer(name, (), answer)
    assert says in str(caught.value)


@pytest.mark.parametrize("answer", ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "starter:policy"])
def test_an_id_on_the_hub_is_not_looked_up(answer):
    assert init_module.checked_answer("policy", (), answer) == answer


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_written_is_the_recipe_with_a_comment_on_each_key(tmp_path, recipe):
    file = tmp_path / "run.yaml"
    assert f"rlhf-tui check {file}" in write(file, "--recipe", recipe)
    example = EXAMPLES / f"{recipe}.yaml" if recipe != "ppo" else starter.FOLDER / "demo.yaml"
    assert config_file.load(file) == config_file.load(example)
    text = file.read_text(encoding="utf-8")
    text = re.sub(r"(?<=  rules:\n)(  - .*\n(    .*\n)*)+", "", text)  # explained by their key
    for before, line in pairwise(text.splitlines()):
        # A section within a section explains its keys.
        if line.startswith("  ") and not line.lstrip().startswith(("#", "overlong:")):
            assert before.lstrip().startswith("#"), line
            assert before.endswith("."), before
    write(file, "--recipe", recipe, "--policy", "org/model", "--force")
    real = config_file.load(file)
    assert real.train.learning_rate <= 1e-5
    assert real.rollout.max_new_tokens == 256
    if real.kl.controller == "adaptive":
        assert largest_change(real.kl.horizon, real.rollout.batch_size) == pytest.approx(0.01)


@pytest.mark.parametrize(("gpus", "dtype"), [(0, "float32"), (1, "bfloat16")])
def test_without_a_gpu_it_says_what_a_run_on_one_needs(tmp_path, monkeypatch, gpus, dtype):
    monkeypatch.setattr(init_module, "gpu_count", lambda: gpus)
    monkeypatch.setattr(init_module, "torch_is_built_for_gpus", lambda: True)
    file = tmp_path / "run.yaml"
    said = write(file, "--policy", "org/model")
    assert config_file.load(file).model.dtype == dtype
    assert ("-o model.dtype=bfloat16" in said) == (not gpus)
    assert "bfloat16" not in write(file, "--force")  # the starter's models are small


def test_paths_are_read_from_where_they_were_given(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"question": "Why?"}\n', encoding="utf-8")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    write("runs/run.yaml", "--prompts", "p.jsonl", "--column", "question", "-o", "train.steps=7")
    config = config_file.load(tmp_path / "runs" / "run.yaml")
    assert (config.data.prompts, config.data.column) == (str(tmp_path / "p.jsonl"), "question")
    assert config.train.steps == 7


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"question": "Why?", "answer": "So."}, "question"),
        ({"prompt": "Why?"}, "prompt"),
        ({"chosen": "Why? So.", "rejected": "Why? No."}, "prompt"),
        ({"messages": []}, "prompt"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_the_column_of_the_prompts_is_asked_for_if_it_has_another_name(
    tmp_path, monkeypatch, row, column, ending
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_tui.commands.init.is_terminal", lambda: True)
    text = ",".join(row) + "\n" if ending == "csv" else json.dumps(row) + "\n"
    Path(f"p.{ending}").write_text(text, encoding="utf-8")
    answers = ["starter:policy", f"p.{ending}", "starter:reward"]
    answers += ["reply", "question"] if column == "question" else []
    done = CliRunner().invoke(init, ["run.yaml"], input="\n".join(answers) + "\n")
    assert done.exit_code == 0, done.output
    assert config_file.load(tmp_path / "run.yaml").data.column == column
    assert ("The column with the prompts (question, answer)" in done.output) == (
        column == "question"
    )


@pytest.mark.parametrize("options", [[], ["--column", "text"]])
def test_a_missing_column_is_told_when_nobody_can_be_asked(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"question": "Why?"}\n', encoding="utf-8")
    with pytest.raises(
        RlhfError, match=r"p\.jsonl has no column .*: give --column one of question"
    ):
        write("run.yaml", "--prompts", "p.jsonl", *options)
    write("run.yaml", "--prompts", "p.jsonl", "-o", "data.column=question")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.yaml"], "run.yaml exists"),
        (["new.yaml", "--prompts", "none.jsonl"], r"data\.prompts: no file"),
        (["new.yaml", "--reward-function", "absent:f"], r"reward\.function: no module 'absent' in"),
        (["new.yaml", "--policy", ""], "--policy is empty; give a value, or leave it out"),
        (["new.yaml", "--column", " "], "--column is empty"),
        (["new.yaml", "-o", "train.stepz=1"], r"did you mean 'train\.steps'"),
        (["no/new.yaml"], "cannot write no/new.yaml"),
    ],
)
def test_what_cannot_be_run_is_not_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(RlhfError, match=message):
        write(*arguments)
    assert [f.name for f in tmp_path.iterdir()] == ["run.yaml"]
    assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == "mine"


def test_an_answer_that_cannot_be_used_is_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_tui.commands.init.is_terminal", lambda: True)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Why?"}\n', encoding="utf-8")
    (tmp_path / "rewards.py").write_text("def score(completions): ...\n", encoding="utf-8")
    files = [f"{tmp_path}/none.jsonl", "p.jsonl"]
    answers = ["starter:policy", *files, "rewards:scores", "rewards:score"]
    done = CliRunner().invoke(init, ["run.yaml"], input="\n".join(answers) + "\n")
    assert done.exit_code == 0, done.output
    assert "Error: data.prompts: no file at" in done.output
    assert "did you mean 'rewards:score'?" in done.output
    config = config_file.load(tmp_path / "run.yaml")
    assert (config.data.prompts, config.reward.function) == (
        str(tmp_path / "p.jsonl"), "rewards:score",
    )  # fmt: skip


def test_an_answer_of_spaces_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_tui.commands.init.is_terminal", lambda: True)
    done = CliRunner().invoke(init, ["run.yaml"], input="\n \n  \n")
    assert done.exit_code == 0, done.output
    config = config_file.load(tmp_path / "run.yaml")
    assert (config.data.prompts, config.reward.model) == ("starter:prompts", "starter:reward")
