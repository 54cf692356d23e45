"""Programs that nobody runs every day: the benchmarks, and the points of the fault program."""

import json
import pkgutil
import sys
import time

import pytest
import torch

from benchmarks import (
    detectors,
    engine_vs_trl,
    growth,
    learning,
    learning_vs_trl,
    loss_memory,
    memory,
    prompts,
    sick_runs,
)
from benchmarks.recorded_runs import read
from benchmarks.side import NO_TRL
from engine import starter
from engine.config import file as config_file
from engine.train.ppo import chunked_loss
from tests.faults.points import POINTS
from tests.faults.rollout_kills import STAGES

REPLACED = sorted(
    {
        name
        for _, variants in learning.TASKS.values()
        for variant in variants
        for ablation in variant
        for name in ablation.replacements
    }
)
CASES = [*memory.ON_CPU, *memory.ON_GPU]
KILLED_AT = sorted({p.place for p in POINTS} | {place for _, place, _, _ in STAGES})


@pytest.mark.parametrize("name", REPLACED + KILLED_AT)
def test_a_function_that_a_program_replaces_exists_under_its_dotted_name(name):
    assert callable(pkgutil.resolve_name(name))


def test_plain_versions_of_all_optimised_functions_give_the_same_steps(tmp_path):
    settings = ["rollout.batch_size=8", "rollout.max_new_tokens=12", "log.tensorboard=false"]
    ours, plain = (
        learning.run_scores(tmp_path, seed=0, steps=2, settings=settings, ablations=ablations)
        for ablations in ([], learning.ALWAYS)
    )
    assert plain == pytest.approx(ours, abs=1e-3)


@pytest.mark.parametrize("settings", sorted({settings for _, settings in CASES}))
def test_the_cases_of_the_memory_benchmark_are_configurations(settings):
    config_file.load(starter.FOLDER / "demo.yaml", [*memory.SHORT.split(), *settings.split()])


def test_the_detectors_read_what_a_sick_run_leaves(tmp_path, capsys):
    row = sick_runs.make(sick_runs.Job("dead-groups", 0, 2, tmp_path, time.monotonic() + 600))
    assert row["error"] is None
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    detectors.print_recorded(read(file, range(1)))
    assert "dead-groups" in capsys.readouterr().out


@pytest.mark.parametrize("program", [engine_vs_trl, learning_vs_trl])
def test_a_comparison_needs_the_trl_that_has_a_ppo_trainer(tmp_path, monkeypatch, program):
    (tmp_path / "trl" / "experimental").mkdir(parents=True)  # since TRL 1.13 without `ppo`
    for name in [n for n in sys.modules if n.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit, match=r"TRL 1\.12") as ended:
        program.main()
    assert ended.value.code == NO_TRL
    del sys.modules["trl.experimental"], sys.modules["trl"]  # those that the program has found


def test_a_start_of_the_prompts_benchmark_takes_time_for_the_prompts(tmp_path):
    rows = prompts.write_rows(tmp_path, 20)
    total, seconds, cpu = prompts.start(prompts.write_configuration(rows, tmp_path))
    assert 0 < cpu < total and seconds > 0


def test_a_large_journal_answers_every_query_of_the_growth_benchmark(tmp_path, capsys):
    growth.grow_journal(tmp_path, steps=300, samples=600)
    assert capsys.readouterr().out.splitlines()[-1].startswith("samples.db (MB)")


def test_the_loss_benchmark_has_the_same_gradient_with_all_logits_and_in_chunks(monkeypatch):
    vocabulary, tokens = 100, torch.arange(24).reshape(2, 12)
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 5 * vocabulary)
    gradients = []
    for most in (loss_memory.ALL, "500"):
        model = loss_memory.build_model(vocabulary)
        loss_memory.step(model, tokens, most)
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*gradients)
