"""A LoRA run from the command line: it starts, is branched off, and leaves in both forms."""

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


def test_both_exports_say_what_they_are(adapted, tmp_path):
    done = adapted.cli("export", "adapted", "--policy", tmp_path / "adapters")
    assert done.returncode == 0, done.stderr
    assert "adapters of step 2" in done.stdout
    described = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert described["r"] == 4
    done = adapted.cli("export", "adapted", "--policy", tmp_path / "whole", "--merged")
    assert done.returncode == 0, done.stderr
    assert "adapters merged" in done.stdout
    assert (tmp_path / "whole" / "config.json").exists()
    assert not (tmp_path / "whole" / "adapter_config.json").exists()


def test_a_merge_that_fails_is_told_in_one_line_and_leaves_nothing(adapted, tmp_path):
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


def test_a_fork_goes_on_from_the_adapters_and_cannot_change_them(adapted):
    fork = ["fork", "adapted", "--from", 2, "--headless", "-o", "train.steps=3"]
    refused = adapted.cli(*fork, "--name", "wider", "-o", "lora.rank=8")
    assert refused.returncode == 2
    assert "lora.rank cannot change on a fork" in refused.stderr
    assert not (adapted.root / "wider").exists()
    done = adapted.cli(*fork, "--name", "branch", "-o", "kl.beta=0.3")
    assert done.returncode == 0, done.stderr
    rows = adapted.json("metrics", "branch")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)


def test_merging_a_run_that_was_trained_in_full_copies_it_and_says_so(whole, tmp_path):
    done = whole.lab.cli("export", "whole", "--policy", tmp_path / "policy", "--merged")
    assert done.returncode == 0, done.stderr
    assert "nothing to merge" in done.stdout
    assert (tmp_path / "policy" / "model.safetensors").exists()
