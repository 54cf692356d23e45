"""Every part of `make gpu-check` and `make gpu-bench` runs on the pretend GPU."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch

from benchmarks.gpu import architectures, bench, check, decoding_speed, whole_runs
from benchmarks.gpu.findings import Finding, Results, Target, run_parts
from benchmarks.task import write_models
from engine import starter
from engine.config import file as config_file
from tests.train.architectures import ARCHITECTURES
from tests.train.gpu.pretend import GPU, pretend_gpu


def findings_of(part, folder):
    with pretend_gpu():
        return list(run_parts({"part": part}, Target(GPU, False, folder)))


LONG = ("decoding", "bfloat16", "8-bit moments", "architectures", "conversations", "variants")
"""Parts of ten seconds and more; what they compute has tests of its own."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in check.IN_PROCESS],
)
def test_a_part_of_the_check_finds_what_it_should_on_the_pretend_gpu(name, tmp_path):
    found = findings_of(check.IN_PROCESS[name], tmp_path)
    assert found and [f for f in found if not f.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - set(architectures.FEW)))
def test_an_architecture_starts_as_it_should_on_the_pretend_gpu(kind, tmp_path):
    found = findings_of(partial(architectures.start_of, kind), tmp_path)
    assert len(found) == 3 and [f for f in found if not f.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", check.OTHER_PROCESSES | check.WHOLE_RUNS)
def test_a_part_with_other_processes_finds_what_it_should_on_a_cpu(name, tmp_path):
    parts = check.OTHER_PROCESSES | check.WHOLE_RUNS
    found = check.check({name: parts[name]}, tmp_path)
    assert found and [f for f in found if not f.passed] == []


def test_a_run_that_is_to_run_out_of_memory_has_the_size_for_it(tmp_path):
    words = whole_runs.words(
        Target(GPU, True, tmp_path),
        "full",
        "demo",
        *whole_runs.options(whole_runs.TOO_MUCH.split()),
    )
    keys = [key for option, key in pairwise(words) if option == "-o"]
    config = config_file.load(starter.FOLDER / "demo.yaml", keys)
    assert (config.rollout.batch_size, config.rollout.max_new_tokens) == (2048, 192)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (decoding_speed.decoding, "decoding, kernels of torch, compiled: never"),
        (decoding_speed.larger_models, "decoding, tiny, compiled: never"),
    ],
)
def test_the_benchmark_decodes_on_the_pretend_gpu(tmp_path, part, name):
    write_models(tmp_path, bench.SMALL_TASK)
    found = findings_of(partial(part, bench.SMALL_TASK), tmp_path)
    assert [(f.name, f.passed) for f in found] == [(name, True)]


def test_a_part_that_raises_is_a_failed_finding_and_the_next_one_runs(tmp_path, capsys):
    def broken(_target):
        raise ValueError("no such kernel")

    def sound(_target):
        yield Finding("sound", True, "as it should be")

    found = list(run_parts({"broken": broken, "sound": sound}, Target(GPU, False, tmp_path)))
    assert [(f.name, f.passed) for f in found] == [("broken", False), ("sound", True)]
    assert "no such kernel" in capsys.readouterr().out


def test_results_are_written_after_each_finding_as_json_and_as_a_paragraph(tmp_path):
    results = Results("check", folder=tmp_path)
    counted = []

    def part(_target):
        yield Finding("decoding", False, "8 ms", {"ms": 8.0})
        counted.append(len(json.loads(results.path.read_text())["findings"]))
        yield Finding("tokens", True, "equal")

    list(run_parts({"part": part}, Target(GPU, False, tmp_path), results.add))
    assert counted == [1]  # as if a time limit had ended the process here
    document = json.loads(results.path.read_text())
    assert [f["figures"] for f in document["findings"]] == [{"ms": 8.0}, {}]
    paragraph = results.path.with_suffix(".md").read_text()
    assert "1 of 2 as they should be; not: decoding" in paragraph
    assert len(list(tmp_path.iterdir())) == 2


def test_the_results_of_some_parts_do_not_replace_those_of_all(tmp_path):
    paths = {Results("check", only, folder=tmp_path).path.name for only in ("", "8-bit", "QLoRA")}
    assert len(paths) == 3


@pytest.mark.parametrize("program", [check, bench])
def test_a_part_that_does_not_exist_is_an_error_that_names_all(program, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["program", "--only", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert "decoding" in capsys.readouterr().err


@pytest.mark.parametrize(("program", "only"), [(check, "sampling"), (bench, "iterations")])
def test_without_a_gpu_a_command_says_so_and_writes_nothing(
    program, only, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("benchmarks.gpu.findings.RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["program", "--only", only])
    assert program.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no GPU here")
    assert list(tmp_path.iterdir()) == []
