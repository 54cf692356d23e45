"""Checkpoints of several rank processes: any strategy reads what any strategy wrote."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.session.checkpoints import checkpoint_path, complete_checkpoints
from engine.train.checkpoints import folder as checkpoint_folder
from tests.train.ranks.launch import run_ranks

SCRIPT = Path(__file__).parent / "ranks" / "saving.py"
STRATEGIES = ("single", "ddp", "fsdp")
OPTIMISERS = {"adamw": (), "adamw_8bit": ("AdamW8bit",)}
"""`train.optimiser` and the words by which the script makes it."""
KINDS = ["adamw", pytest.param("adamw_8bit", marks=pytest.mark.slow)]


def start(folder, *actions):
    """Carries out actions of the script, on one rank if they are of `single`, else on two."""
    words = [word for action in actions for word in ("--", *action)][1:]
    return run_ranks(1 if actions[0][1] == "single" else 2, SCRIPT, *words, folder=folder)


def results(folder, act="save"):
    """The results that each rank wrote."""
    return [json.loads(p.read_text()) for p in sorted(folder.glob(f"{act}-*.json"))]


@pytest.fixture(scope="module")
def all_saved(request, tmp_path_factory):
    """Optimiser → strategy → folder of its checkpoint, which all strategies have read.

    Of the optimisers that the selected tests need.
    """
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    needed = {"adamw"} | {p.params["kind"] for p in parameters if p and "kind" in p.params}
    kinds = {k: words for k, words in OPTIMISERS.items() if k in needed}
    folders = {k: {s: tmp_path_factory.mktemp(s) for s in STRATEGIES} for k in kinds}
    every = [folder for of_kind in folders.values() for folder in of_kind.values()]
    for folder in every:
        (folder / "checkpoints").mkdir()

    def saves(strategy):
        return [("save", strategy, folders[k][strategy], *words) for k, words in kinds.items()]

    several = [s for s in STRATEGIES if s != "single"]
    for actions in (
        saves("single"),
        [*(a for s in several for a in saves(s)), *(("load", s, *every) for s in several)],
        [("load", "single", *every)],
    ):
        done = start(tmp_path_factory.mktemp("ranks"), *actions)
        assert done.code == 0, done.output
    return folders


@pytest.fixture(scope="module")
def saved(all_saved):
    """The folders of the checkpoints with float32 moments, by strategy."""
    return all_saved["adamw"]


def expected(folder):
    """The tensors when the save began: those of the policy, and the rest."""
    tensors = load_file(folder / "expected.safetensors")
    lm = {k.removeprefix("lm/"): t for k, t in tensors.items() if k.startswith("lm/")}
    return lm, {k: t for k, t in tensors.items() if not k.startswith("lm/")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", STRATEGIES)
@pytest.mark.parametrize("writer", STRATEGIES)
def test_optimiser_value_function_and_average_are_read_bit_for_bit_by_any_strategy(
    all_saved, writer, reader, kind
):
    folder = all_saved[kind][writer]
    assert all(result == {"step": 7} for result in results(folder, "load"))
    read = load_file(folder / f"read-by-{reader}.safetensors")
    _, wanted = expected(folder)
    average = load_file(folder / "average.safetensors")
    wanted |= {f"ema/{k}": t for k, t in average.items()}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[k], wanted[k]) for k in wanted)
    assert any(k.startswith("exp_avg_sq/value_trunk.") for k in wanted)
    packed = [k for k, t in wanted.items() if t.dtype == torch.uint8]
    assert bool(packed) == (kind == "adamw_8bit") == any("_scale/" in k for k in wanted)


@pytest.mark.parametrize("writer", STRATEGIES)
def test_plain_transformers_loads_the_policy_that_many_ranks_wrote(saved, writer):
    folder = saved[writer]
    policy, average = (
        checkpoint_path(folder / "checkpoints", 7) / name for name in ("policy", "policy-ema")
    )
    wanted, _ = expected(folder)
    for saved_lm, tensors in (
        (average, load_file(folder / "average.safetensors")),
        (policy, wanted),
    ):
        lm = AutoModelForCausalLM.from_pretrained(saved_lm)
        read = dict(lm.named_parameters())
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], tensors[k]) for k in tensors)
    assert type(lm).__name__ == "LlamaForCausalLM"
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(policy)("film").input_ids


@pytest.mark.parametrize("writer", ["ddp", "fsdp"])
def test_each_rank_writes_its_share_and_no_other_files_remain(saved, writer):
    folder = saved[writer]
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "COMPLETE", "ema", "policy", "policy-ema", "state.json", "training",
    ]  # fmt: skip
    shards = [p.stat().st_size for p in sorted((checkpoint / "training").iterdir())]
    assert len(shards) == 2
    assert max(shards) < 0.6 * sum(shards)
    assert [result["concluded"] for result in results(folder)] == [1, 0]
    assert len({result["size"] for result in results(folder)}) == 1


def test_only_safetensors_and_text_are_written(saved):
    folder = saved["fsdp"]
    files = [p for p in (folder / "checkpoints").rglob("*") if p.is_file()]
    names = {p.suffix or p.name for p in files}
    assert names <= {".safetensors", ".json", ".jinja", ".txt", "COMPLETE"}


@pytest.mark.slow
def test_a_full_disk_on_one_rank_fails_the_save_on_all_and_leaves_no_files(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    done = start(tmp_path, ("save", "fsdp", tmp_path, "full"))
    assert done.code == 0, done.output
    first, second = results(tmp_path)
    assert first["error"] == second["error"]
    assert "No space left" in first["error"]
    assert "rank 1" in first["error"]
    assert (first["concluded"], second["concluded"]) == (1, 0)
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_a_writer_that_dies_leaves_no_complete_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    done = start(tmp_path, ("save", "fsdp", tmp_path, "crash"))
    assert done.code != 0
    assert complete_checkpoints(tmp_path / "checkpoints") == {}
    checkpoint_folder.clear_parts(tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == []
