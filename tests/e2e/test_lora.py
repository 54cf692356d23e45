"""A LoRA run on the command line: train, fork, and export with and without merging."""

import json

import pytest

SMALL = (
    "lora.rank=4",
    "rollout.batch_size=8",
    "rollout.max_new_tokens=8",
    "ppo.minibatches=2",
    "launch.threads=1",
)


@pytest.fixture(scope="module")
def adapted(lab):
    """A finished run of two steps."""
    options = [part for key in SMALL for part in ("-o", key)]
    done = lab.cli("demo", "--headless", "--name", "adapted", "--steps", 2, *options)
    assert done.returncode == 0, done.stderr
    return lab


@pytest.mark.slow
def test_both_exports_report_their_kind(adapted, tmp_path):
    done = adapted.cli("export", "adapted", "--policy", tmp_path / "adapters")
    assert done.returncode == 0, done.stderr
    assert "adapters of step 2" in done.stdout
    adapter_config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert adapter_config["r"] == 4
    done = adapted.cli("export", "adapted", "--policy", tmp_path / "whole", "--merged")
    assert done.returncode == 0, done.stderr
    assert "adapters merged" in done.stdout
    assert (tmp_path / "whole" / "config.json").exists()
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_run_on_adapters_exports_a_whole_model(adapted, tmp_path):
    options = [part for key in SMALL for part in ("-o", key)]
    done = adapted.cli("export", "adapted", "--policy", tmp_path / "sft")
    assert done.returncode == 0, done.stderr
    first = ["demo", "--headless", "--name", "on-adapters", "--steps", 2, *options]
    done = adapted.cli(*first, "-o", f"model.policy={tmp_path / 'sft'}")
    assert done.returncode == 0, done.stderr
    done = adapted.cli("export", "on-adapters", "--policy", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    assert f"adapters merged, with those in {tmp_path / 'sft'}" in done.stdout
    assert (tmp_path / "both" / "config.json").exists()
    assert not (tmp_path / "both" / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_failed_merge_is_one_line_and_leaves_nothing(adapted, tmp_path):
    weights = adapted.root / "adapted" / "checkpoints" / "step-000002" / "policy"
    weights = weights / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        done = adapted.cli("export", "adapted", "--policy", tmp_path / "whole", "--merged")
    finally:
        weights.write_bytes(good)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "damaged" in done.stderr
    assert not (tmp_path / "whole").exists()


@pytest.mark.slow
def test_a_fork_starts_from_the_adapters_and_cannot_change_their_configuration(adapted):
    fork = ["fork", "adapted", "--from", 2, "--headless", "-o", "train.steps=3"]
    refused = adapted.cli(*fork, "--name", "wider", "-o", "lora.rank=8")
    assert refused.returncode == 2
    assert "lora.rank cannot change on a fork" in refused.stderr
    assert not (adapted.root / "wider").exists()
    done = adapted.cli(*fork, "--name", "adapted-branch", "-o", "kl.beta=0.3")
    assert done.returncode == 0, done.stderr
    rows = adapted.json("metrics", "adapted-branch")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)


def test_merging_a_run_without_adapters_copies_the_policy_and_reports_it(whole, tmp_path):
    done = whole.lab.cli("export", "whole", "--policy", tmp_path / "policy", "--merged")
    assert done.returncode == 0, done.stderr
    assert "nothing to merge" in done.stdout
    assert (tmp_path / "policy" / "model.safetensors").exists()
