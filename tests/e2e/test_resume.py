"""Resumes of runs that ended, and forks. tests/e2e/test_kill.py has resumes after a crash."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.e2e.lab import numbers


def test_the_controller_changes_beta_in_every_step(whole):
    assert len(set(whole.betas().values())) == 8


def test_a_fork_shares_the_past(whole, branch):
    assert branch.numbers()[:4] == whole.numbers()[:4]


def test_a_fork_with_another_beta_differs_after(whole, branch):
    assert branch.betas()[5] == 0.5
    change = branch.commands()["start-2-beta"]
    assert (change["old"], change["new"]) == (whole.betas()[5], 0.5)
    assert all(
        forked != original
        for forked, original in zip(branch.numbers()[4:], whole.numbers()[4:], strict=True)
    )


def test_a_fork_records_its_origin(branch):
    assert branch.events("attempt")[-1]["fork"] == {"from": "whole", "step": 4}


def test_resuming_a_finished_run_says_how_to_extend_it(whole):
    done = whole.lab.cli("resume", "whole", "--headless")
    assert done.returncode == 0
    assert "-o train.steps=" in done.stdout


@pytest.mark.slow
def test_a_resume_finishes_a_run_that_crashed_after_its_last_save(lab, whole):
    copy = lab.root / "almost"
    shutil.copytree(whole.session.folder, copy)
    with sqlite3.connect(copy / "journal.db") as db:
        db.execute("UPDATE meta SET value = '\"running\"' WHERE key = 'state'")
    assert lab.json("status", "almost")["state"] == "crashed"
    done = lab.cli("resume", "almost", "--headless")
    assert done.returncode == 0, done.stderr
    row = lab.json("status", "almost")
    assert (row["state"], row["step"], row["attempt"]) == ("finished", 8, 2)
    assert numbers(lab.json("metrics", "almost")) == whole.numbers()


@pytest.mark.slow
def test_resuming_from_a_step_starts_a_new_attempt_there(lab, whole, branch):
    # The same seed and settings from the same checkpoint repeat the same steps.
    before = branch.numbers()
    keys = ("-o", "kl.beta=0.5", "-o", "train.steps=8")
    done = lab.cli("resume", "branch", "--from", "4", *keys, "--headless")
    assert done.returncode == 0, done.stderr
    assert branch.numbers() == before
    with branch.reader() as reader:
        assert reader.attempts()[-1].from_step == 4
        assert reader.attempts()[-1].fresh == 1


def test_a_resume_whose_input_is_wrong_leaves_the_configuration_as_it_was(lab, whole):
    copy = lab.root / "misled"
    shutil.copytree(whole.session.folder, copy)
    before = (copy / "config.yaml").read_text()
    wrong = ("-o", "reward.mix=[]", "-o", "reward.function=json:not_there")
    done = lab.cli("resume", "misled", "-o", "train.steps=9", *wrong, "--headless")
    assert done.returncode == 2
    assert "not_there" in done.stderr
    assert (copy / "config.yaml").read_text() == before
    assert len(lab.json("metrics", "misled")) == 8


@pytest.mark.slow
def test_a_fork_says_which_defaults_of_its_parent_it_keeps(lab):
    parent = lab.run("parent", "ppo.advantage=rloo", "train.save_every=1", steps=1)
    assert parent.lab.cli(*parent.arguments, "--headless").returncode == 0
    keys = ("ppo.advantage=gae", "model.value=reward_model", "ppo.whiten=true", "train.steps=2")
    options = [word for key in keys for word in ("-o", key)]
    done = lab.cli("fork", "parent", "--from", "1", "--name", "fitted", *options, "--headless")
    assert done.returncode == 0, done.stderr
    kept = [
        "rollout.per_prompt 4 (default now 1)", "ppo.lam 0.95 (default now 0.9)",
        "ppo.lam_value off (default now 0.95)",
    ]  # fmt: skip
    assert f"rlhf-tui: kept from 'parent': {', '.join(kept)}; -o changes them" in done.stderr


@pytest.mark.slow
def test_a_fork_whose_input_is_wrong_leaves_no_session(lab, whole):
    wrong = ("-o", "reward.mix=[]", "-o", "reward.function=json:not_there")
    done = lab.cli("fork", "whole", "--from", "4", "--name", "wrong", *wrong, "--detach")
    assert done.returncode == 2
    assert "not_there" in done.stderr
    assert not (lab.root / "wrong").exists()


def test_a_step_without_a_checkpoint_is_refused_with_a_list_of_checkpoints(whole):
    done = whole.lab.cli("resume", "whole", "--from", "3")
    assert done.returncode == 3
    assert "4, 8" in done.stderr
    done = whole.lab.cli("fork", "whole", "--from", "5", "--name", "never")
    assert done.returncode == 3
    assert not Path(whole.lab.root / "never").exists()


def test_a_fork_without_a_step_begins_with_the_last_checkpoint(whole):
    done = whole.lab.cli("fork", "whole", "--name", "never")
    assert done.returncode == 2
    assert "step 8 is the end of 8 steps" in done.stderr
    assert not Path(whole.lab.root / "never").exists()


@pytest.mark.parametrize("key", ["seed=1", "data.column=other", "rollout.batch_size=8"])
def test_a_resume_refuses_keys_that_determine_the_model_or_the_order_of_the_data(whole, key):
    done = whole.lab.cli("resume", "whole", "-o", key, "-o", "train.steps=9")
    assert done.returncode == 2
    assert key.partition("=")[0] in done.stderr
    assert "fork" in done.stderr
