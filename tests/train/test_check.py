"""A configuration is tried without a run: `rlhf-tui check`."""

import shutil
import tempfile

import pytest

from engine import starter
from engine.config import file as config_file
from engine.errors import UserInputError
from engine.protocol.programs.check_result import TimedStep
from engine.train.check import check, reduced, suggested_value
from engine.train.reports.setup_notes import plain_prompts, slow_controller
from rlhf_tui.commands.check import report, step_estimate
from tests.train.conftest import SMALL


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """An own folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def chat_policy(tmp_path):
    """Makes a copy of the starter's policy with a chat template, or with None."""

    def make(template):
        folder = tmp_path / "policy"
        shutil.copytree(starter.resolve("starter:policy"), folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return make


def rewards(completions, **_):
    return [0.0] * len(completions)


def config(*overrides):
    return config_file.load(starter.FOLDER / "demo.yaml", [*SMALL, *overrides])


def test_a_whole_step_is_taken_on_two_prompts_and_nothing_is_left(temporary):
    tried = config("ppo.advantage=rloo", "rollout.batch_size=24", "rollout.per_prompt=4",
                   "reward.normalise=reference", "eval.every=5", "train.save_every=5",
                   "eval.holdout=8", "launch.processes=2")  # fmt: skip
    result = check(tried)
    assert result.responses == 8
    assert result.ratio == pytest.approx(1, abs=1e-4)
    assert result.kl == pytest.approx(0, abs=1e-3)
    assert len(result.samples) == 2
    text = (starter.FOLDER / "prompts.jsonl").read_text(encoding="utf-8")
    assert result.prompts == len(text.splitlines()) - 8
    assert set(result.phases) == {"generate", "score", "reference", "optimise"}
    assert sum(result.phases.values()) <= result.step_seconds
    assert list(temporary.iterdir()) == []
    lines = "\n".join(report(tried, result)).replace("-0.0000", "0.0000")
    assert "ratio 1.0000, KL 0.0000" in lines
    assert result.larger_step is not None and result.larger_step.responses == 12
    assert "240 steps of 24 responses on 2 ranks: about " in lines


@pytest.mark.parametrize(
    ("overrides", "suggested"),
    [
        ((), True),
        (("model.value=reward_model",), False),
        (("ppo.advantage=rloo", "rollout.per_prompt=2"), False),
        (("rollout.dynamic=true", "rollout.per_prompt=2"), False),
        (("reward.model=null", f"reward.function={__name__}:rewards"), False),
    ],
)
def test_a_fitted_value_function_is_suggested_where_it_can_be_used(make_run, overrides, suggested):
    run, _ = make_run(*overrides)
    found = suggested_value(run.config, run)
    assert ["model.value: reward_model" in text for text in found] == [True] * suggested


@pytest.mark.parametrize(
    ("template", "overrides", "noted"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", (), True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ("data.chat=true",), False),
        (None, (), False),
    ],
)
def test_plain_prompts_of_a_chat_model_are_noted(make_run, chat_policy, template, overrides, noted):
    policy = f"model.policy={chat_policy(template)}"
    run, _ = make_run(policy, "model.reference=starter:policy", *overrides)
    assert ["data.chat: true" in text for text in plain_prompts(run)] == [True] * noted


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (("kl.horizon=10000",), ["kl.horizon: 1280 allows 1% a step"]),  # 1.00128^240 = 1.4
        (("kl.horizon=1280",), []),
        # So short a run needs more than the usual horizon allows: 1.01^60 = 1.8.
        (("kl.horizon=1280", "train.steps=60"), ["kl.horizon: 547 allows 2.3% a step"]),
        (("kl.horizon=547", "train.steps=60"), []),
        (("kl.horizon=10000", "train.steps=2000"), []),
        (("kl.horizon=10000", "kl.controller=fixed"), []),
        (("kl.horizon=10000", "train.steps=20"), []),  # a trial
    ],
)
def test_a_controller_that_is_too_slow_for_the_run_is_noted_with_one_that_is_not(overrides, advice):
    demo = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    assert [text.partition("runs away; ")[2] for text in slow_controller(demo)] == advice


@pytest.mark.parametrize(
    ("larger", "responses", "seconds"),
    [
        (TimedStep(6, 3.0), 64, 32.0),
        (TimedStep(6, 0.9), 64, 0.9),  # a GPU, and noise
        (TimedStep(6, 3.0), 1, 1.0),
        (None, 2, 1.0),
        (None, 8, 4.0),
    ],
)
def test_the_time_of_a_step_grows_by_what_each_response_added(larger, responses, seconds):
    assert step_estimate(TimedStep(2, 1.0), larger, responses) == pytest.approx(seconds)


def test_what_cannot_be_used_is_the_error_of_a_run_and_leaves_nothing(temporary):
    with pytest.raises(UserInputError, match=r"no column 'question'"):
        check(config("data.column=question"))
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("recipe", ["dapo", "vc-ppo", "ppo-ziegler"])
def test_two_prompts_obey_the_rules_between_keys(recipe):
    example = starter.FOLDER.parents[1] / "examples" / f"{recipe}.yaml"
    small = reduced(config_file.load(example))
    assert small.prompts_per_step == 2
    assert config_file.from_tree(config_file.to_tree(small)).ppo.minibatches == 1
