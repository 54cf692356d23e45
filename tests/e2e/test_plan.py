"""The output, the warnings and the accuracy of the memory planner."""

import json
import shutil

import pytest

from engine import starter

TOLERANCE = 0.25
DEMO = starter.FOLDER / "demo.yaml"


@pytest.fixture
def huge(tmp_path):
    """The folder of a model with 400 billion parameters: configuration and tokenizer only."""
    folder = tmp_path / "huge"
    shutil.copytree(
        starter.FOLDER / "policy", folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_the_estimate_for_the_starter_is_within_a_quarter_of_the_measured_peak(lab):
    done = lab.cli(
        "demo", "--headless", "--name", "measured", "--steps", 2,
        "-o", "ppo.epochs=1", "-o", "launch.device=cpu", "-o", "launch.threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "estimated to need" not in done.stderr
    ready = next(e for e in lab.json("events", "measured") if e["kind"] == "ready")
    measured = max(row["perf/peak_memory_gb"] for row in lab.json("metrics", "measured"))
    assert ready["planned_memory_gb"] == pytest.approx(measured, rel=TOLERANCE)
    # `plan` and the rank compute the same estimate.
    planned = lab.json("plan", DEMO, "-o", "launch.device=cpu")
    assert planned["configured"]["peak"] / 1e9 == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_check_estimates_what_plan_does(lab, nodes):
    options = ("-o", "launch.device=cpu")
    if nodes > 1:
        options += ("-o", f"launch.nodes={nodes}", "-o", "launch.rendezvous=127.0.0.1:29400")
    planned = lab.json("plan", DEMO, *options)["configured"]
    checked = lab.json("check", DEMO, *options)["planned_memory"]
    assert planned["ranks"] == nodes
    assert checked == pytest.approx(planned["peak"] / 1e9, rel=0.05)


@pytest.mark.slow
def test_the_strategies_stand_side_by_side_on_80_columns(lab):
    done = lab.cli("plan", DEMO, "--processes", 4, "-o", "launch.device=cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    head = next(line for line in lines if "fsdp" in line)
    assert head.split() == ["1", "rank", "ddp", "×4", "fsdp", "×4"] * 2
    for part in ("policy", "optimiser", "reference", "reward", "KV cache", "logits"):
        assert part in done.stdout
    assert "the run fits" in done.stdout


def test_the_replies_of_an_environment_are_named(lab):
    keys = ("environment.factory=json:JSONDecoder", "environment.max_tokens=40")
    options = [word for key in (*keys, "launch.device=cpu") for word in ("-o", key)]
    done = lab.cli("plan", DEMO, *options)
    assert done.returncode == 0, done.stderr
    assert "responses of 32, replies of 40" in done.stdout


def test_a_run_is_planned_for_gpus_that_are_not_here(lab):
    options = ("-o", "launch.device=cuda", "-o", "log.trackers=['absent_package.x:Tracker']")
    done = lab.cli("plan", DEMO, "--gpus", "4x80", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GPU memory of each rank")
    assert "ddp ×4" in done.stdout
    assert "Planned for 4 GPUs of 80.0 GB. Layouts that fit: all." in done.stdout
    assert "refused" not in done.stdout
    for wrong in ("4", "0x80", "4x0", "x"):
        done = lab.cli("plan", DEMO, "--gpus", wrong)
        assert done.returncode == 2
        assert "such as 8x80" in done.stderr


def test_a_package_that_a_run_here_lacks_is_named_and_the_estimate_is_made(lab):
    done = lab.cli(
        "plan", DEMO, "-o", "launch.device=cpu", "-o", "log.trackers=['absent_package.x:Tracker']"
    )
    assert done.returncode == 0, done.stderr
    assert "peak of a step" in done.stdout
    last = " ".join(done.stdout.split("A run on this machine would be refused: ")[1].split())
    assert last == "log.trackers: absent_package.x:Tracker is not installed here: see PYTHONPATH"


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_reported_with_changes_that_help(lab, huge):
    options = ("-o", f"model.policy={huge}", "-o", "launch.device=cpu")
    done = lab.cli("plan", DEMO, *options)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "-o ppo.micro_batch_size=" in done.stdout or "smaller model" in done.stdout
    data = lab.json("plan", DEMO, *options)
    assert not data["configured"]["fits"]
    assert data["changed_peak"] < data["configured"]["peak"]


@pytest.mark.slow
def test_a_run_warns_before_it_loads_a_model_that_does_not_fit(lab, huge):
    done = lab.cli(
        "run", DEMO, "--headless", "--name", "too-large",
        "-o", f"model.policy={huge}", "-o", "launch.device=cpu",
    )  # fmt: skip
    assert "estimated to need" in done.stderr
    # The warning does not end the run; the missing weights do.
    assert done.returncode == 2
    assert "weights" in done.stderr or "no model that can be loaded" in done.stderr


@pytest.mark.slow
def test_a_missing_model_is_a_user_error_in_one_line(lab, tmp_path):
    for name in (tmp_path / "nowhere", "nobody/no-such-model"):
        done = lab.cli("plan", DEMO, "-o", f"model.policy={name}")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "model.policy" in done.stderr
        assert not done.stdout
