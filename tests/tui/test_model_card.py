"""The card of an exported policy: what it says, and what it keeps to itself."""

import re

import pytest
import yaml

from engine.config import file as config_file
from rlhf_tui.report.model_card import ExportedPolicy, model_card
from tests.tui.test_held_out import make_evaluated

PRIVATE = [
    "model.policy=/home/anna/models/mine",
    "reward.model=null",
    "reward.mix=[{model: /data/scores, name: a}, {service: 'http://10.0.0.7/s?key=k', name: b}]",
    "rollout.python=/home/anna/vllm/bin/python",
    "rollout.rendezvous=10.0.0.1:29500",
    "train.best_metric=objective/kl",
]


@pytest.fixture
def with_settings(session_maker, tmp_path):
    """Makes a session of 200 steps with further settings."""

    def make(*overrides, name="mine"):
        session = session_maker(tmp_path, name)
        session.write_config(config_file.override(session.config(), list(overrides)))
        return session

    return make


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_names_no_folders_addresses_or_people(with_settings):
    card = model_card(with_settings(*PRIVATE), ExportedPolicy(200))
    assert "from mine." in card
    assert "the model scores, a service" in card
    assert "| train.best_metric | objective/kl |" in card
    for private in ("home", "anna", "data/", "10.0.0", "key=", "pts/", "29500"):
        assert private not in card


def test_a_score_of_an_environment_is_named_by_its_method(with_settings):
    session = with_settings(
        "environment.factory=games:Guess", "reward={environment: solved, model: null}"
    )
    card = model_card(session, ExportedPolicy(200))
    assert "- rewards: the method solved of the environment\n" in card


def test_changes_up_to_the_checkpoint_are_listed(with_settings):
    session = with_settings()
    rows = re.compile(r"^\| [0-9]+ \| (beta|target) ", re.MULTILINE)
    cards = [model_card(session, ExportedPolicy(step)) for step in (50, 100, 200)]
    assert [len(rows.findall(card)) for card in cards] == [0, 1, 2]


def test_results_are_those_of_the_checkpoint_s_step(tmp_path):
    session = make_evaluated(tmp_path)
    early, late = (model_card(session, ExportedPolicy(step)) for step in (20, 60))
    assert "(step 20)" in early
    assert "(step 60)" not in early
    assert "(step 60)" in late
    assert early.split("## Results")[1] != late.split("## Results")[1]


def test_both_held_out_scores_have_their_interval(tmp_path):
    card = model_card(make_evaluated(tmp_path), ExportedPolicy(60))
    row = next(line for line in card.splitlines() if "(step 60)" in line)
    assert len(re.findall(r"[0-9.]+ ± [0-9.]+ \(step [0-9]+\)", row)) == 2


@pytest.mark.parametrize("adapters", [False, True])
def test_the_header_names_what_is_on_the_hub(with_settings, adapters):
    session = with_settings(
        "model.policy=HuggingFaceTB/SmolLM2-360M", "data.prompts=trl-lib/ultrafeedback-prompt"
    )
    found = header(model_card(session, ExportedPolicy(200, adapters=adapters)))
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-360M"
    assert found["datasets"] == ["trl-lib/ultrafeedback-prompt"]
    assert found["library_name"] == ("peft" if adapters else "transformers")


def test_text_of_a_session_cannot_end_a_block_or_open_a_tag(with_settings):
    session = with_settings('data.system="````\\n<b>\\n# Title"')
    card = model_card(session, ExportedPolicy(200))
    assert "`````text\n````\n<b>\n# Title\n`````" in card
