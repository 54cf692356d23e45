"""Rollouts by an engine of its own: weights, versions, and engines that fail.

The engine is a stand-in here; tests/vllm has the same with vLLM.
"""

import inspect
import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from engine import starter
from engine.config import file as config_file
from engine.errors import LinkError, RlhfError, UserInputError
from engine.launch.environment import ROLLOUT_FOLDER_VARIABLE, rollout_socket_variable
from engine.protocol import frames
from engine.protocol.rollout.messages import (
    ATTEMPTS,
    EndedTurn,
    EngineFailed,
    Generate,
    LoadWeights,
    NextTurn,
    NextTurns,
    Progress,
    Start,
    WeightsLoaded,
)
from engine.session.folder import create
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.experience.generation import generate_rollout
from engine.train.experience.model_outputs import old_policy_outputs
from engine.train.experience.rollout_check import check_weights, version_lag
from engine.train.models.adapters import lora
from engine.train.reports.probe import answer_probe
from engine.train.rollout.vllm import remote_engines
from engine.train.rollout.vllm.checksum import checksum
from engine.train.rollout.vllm.process import received_weights
from engine.train.rollout.vllm.process.received_weights import (
    DEVICE_OF_HANDLE,
    IncompleteUpdateError,
    from_ipc,
)
from engine.train.rollout.vllm.remote_engines import turns_in_message
from engine.train.rollout.vllm.updates import (
    COUNTER,
    STORAGE_CLASS,
    readers,
    without_expandable_segments,
)
from engine.train.rollout.vllm.weights import file_size, folder_with_room
from engine.train.step import train_step
from tests.train.conftest import SMALL
from tests.train.ranks.launch import run_ranks
from tests.train.weights_file import write_weights
from tests.waiting import until

VLLM = "rollout.engine=vllm"
ENDED = Path(__file__).parent / "ranks" / "ended.py"


def dies_at(kind, after=0):
    """An engine that ends the connection at a message of a type, after so many of them."""
    seen = []

    def fault(message):
        seen.extend([1] * isinstance(message, kind))
        if isinstance(message, kind) and len(seen) > after:
            raise ConnectionError

    return fault


def replies(kind, reply):
    """An engine with a reply of its own to the messages of a type."""
    return lambda message: reply(message) if isinstance(message, kind) else None


# -- a step ----------------------------------------------------------------------------------------


def test_steps_with_an_engine_are_those_of_native_rollouts(make_run, engine):
    run, _ = make_run(VLLM)
    native, _ = make_run()
    for step in (1, 2):
        ours, samples = train_step(run, step)
        theirs, expected = train_step(native, step)
        assert [s.response for s in samples] == [s.response for s in expected]
        assert ours["objective/scores"] == pytest.approx(theirs["objective/scores"], abs=1e-4)
        assert ours["policy/entropy_avg"] == pytest.approx(theirs["policy/entropy_avg"], abs=1e-4)
        assert ours["rollout/version_lag"] == theirs["rollout/version_lag"] == 0
        assert ours["val/rollout_logprob_gap"] < 1e-4
        assert "time/sync" in ours
        assert "time/sync" not in theirs


def test_weights_are_sent_once_a_step_and_again_only_when_they_have_changed(make_run, engine):
    run, _ = make_run(VLLM, "eval.every=1", "eval.holdout=2")
    train_step(run, 1)
    evaluate_if_due(run, 1)
    run.state.step = 1
    answer_probe(run, "The film was")
    train_step(run, 2)
    # At the start, for the evaluation after step 1, which step 2 and the probe use as well.
    assert engine.messages.count("LoadWeights") == 2
    assert engine.engines == 1


def test_an_evaluation_of_averaged_weights_is_generated_with_these(make_run, engine):
    keys = ("eval.every=1", "eval.holdout=4", "train.ema.decay=0.5", "train.learning_rate=1e-2")
    run, _ = make_run(VLLM, *keys)
    native, _ = make_run(*keys)
    for each in (run, native):
        train_step(each, 1)
    ours, theirs = (evaluate_if_due(each, 1).metrics for each in (run, native))
    assert ours["eval/ema_score"] == pytest.approx(theirs["eval/ema_score"], abs=1e-3)
    assert ours["eval/score"] == pytest.approx(theirs["eval/score"], abs=1e-3)
    assert ours["eval/ema_score"] != ours["eval/score"]


def test_a_response_ends_at_a_stop_string_and_the_engine_stops_generating_it(make_run, engine):
    run, _ = make_run(VLLM, "rollout.stop=[a, e]", "rollout.max_new_tokens=12")
    native, _ = make_run("rollout.stop=[a, e]", "rollout.max_new_tokens=12")
    ours = generate_rollout(run, 1)
    theirs = generate_rollout(native, 1)
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.ended, theirs.ended)
    assert engine.stopped


def test_log_pi_old_is_the_trainers_own_whatever_the_engine_reports(make_run, engine):
    run, _ = make_run(VLLM)
    rollout = generate_rollout(run, 1)
    right, values = old_policy_outputs(run, rollout, rollout.rows)
    rollout.logprobs = rollout.logprobs - 1
    again, _ = old_policy_outputs(run, rollout, rollout.rows)
    assert torch.equal(right, again)
    assert values.shape == right.shape


@pytest.fixture
def generate_on_two_ranks(engine, half_models, tmp_path):
    """Returns a function that runs tests/train/ranks/ended.py and returns what it writes."""
    result = tmp_path / "told.json"

    def run(*keys):
        keys = (*SMALL, *half_models, VLLM, "launch.processes=2", *keys)
        session = create(tmp_path, "s", config_file.load(starter.FOLDER / "demo.yaml", keys))
        variables = (
            f"{name}={os.environ[name]}"
            for name in (rollout_socket_variable(0), ROLLOUT_FOLDER_VARIABLE)
        )
        outcome = run_ranks(2, ENDED, session.folder, result, *variables, folder=tmp_path)
        assert outcome.code == 0, outcome.output
        return json.loads(result.read_text())

    return run


@pytest.mark.parametrize("per_prompt", [1, 2])
def test_rank_0_is_told_of_the_responses_of_all_ranks_when_they_have_ended(
    generate_on_two_ranks, per_prompt
):
    found = generate_on_two_ranks(f"rollout.per_prompt={per_prompt}")
    assert sorted(found["told"]) == sorted(found["all"])


def test_ranks_that_wait_for_the_engine_say_so(generate_on_two_ranks, engine, tmp_path):
    """Otherwise one would be taken for one that hangs, when responses take long."""
    waits = tmp_path / "told.json-waits"

    def goes_on_when_told(message):
        if isinstance(message, NextTurns) and engine.turns:
            until(waits.exists, "a report of a rank that waits", 30)

    engine.faults = iter([goes_on_when_told])
    generate_on_two_ranks()
    assert engine.engines == 1


# -- large batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [40, 11_264, 200_000])
def test_no_message_of_long_responses_is_over_the_limit(longest):
    most = turns_in_message(longest)
    token, floats = 2**31 - 1, bytes(4 * longest)
    turns = [NextTurn(i, [token] * (longest - 1), bytes(8)) for i in range(most)]
    ended = [EndedTurn(i, [token] * longest, floats, floats) for i in range(most)]
    tokens = {most + i: [token] * longest for i in range(2 * most)}
    progress = Progress(weights_version=1, busy=True, done=1, ended=ended, tokens=tokens)
    for message in (NextTurns(turns=turns), progress):
        assert len(frames.encode(message)) < frames.MAX_FRAME


def test_a_batch_in_several_messages_has_the_same_responses(make_run, engine, monkeypatch):
    monkeypatch.setattr(remote_engines, "BUDGET", 1)
    run, _ = make_run(VLLM, "rollout.stop=[a, e]")
    native, _ = make_run("rollout.stop=[a, e]")
    said = []
    rollout = generate_rollout(run, 1, lambda done, total: said.append((done, total)))
    assert torch.equal(rollout.ids, generate_rollout(native, 1).ids)
    assert engine.turns == [[row] for row in range(8)]
    assert said == sorted(said)


def test_an_engine_holds_twice_as_many_responses_as_it_generates_at_once(
    make_run, engine, monkeypatch
):
    monkeypatch.setattr(remote_engines, "WAITING", 1)
    run, _ = make_run(VLLM, "rollout.at_once=2", "rollout.stop=[a, e]")
    native, _ = make_run("rollout.stop=[a, e]")
    assert torch.equal(generate_rollout(run, 1).ids, generate_rollout(native, 1).ids)
    assert len(engine.turns[0]) == 4
    assert [row for turns in engine.turns for row in turns] == [*range(8)]


def test_a_message_over_the_limit_ends_the_run_with_a_reason(make_run, engine, monkeypatch):
    monkeypatch.setattr(frames, "MAX_FRAME", 10)
    with pytest.raises(RlhfError, match=r"cannot be asked: .* over the limit of 10$") as raised:
        make_run(VLLM)
    assert not isinstance(raised.value, LinkError)  # with which a rank ends without a word


# -- several engines -------------------------------------------------------------------------------


TWO = (VLLM, "rollout.engines=2")


def test_two_engines_generate_the_responses_of_one_from_the_same_file(
    make_run, engine, second_engine
):
    keys = ("rollout.batch_size=7", "rollout.stop=[a, e]", "ppo.minibatches=1",
            "ppo.micro_batch_size=7")  # fmt: skip
    run, _ = make_run(*TWO, *keys)
    native, _ = make_run(*keys)
    for step in (1, 2):
        (ours, samples), (_, expected) = train_step(run, step), train_step(native, step)
        assert [s.response for s in samples] == [s.response for s in expected]
        assert ours["rollout/version_lag"] == 0
        run.state.step = step
    assert (engine.rows, second_engine.rows) == ([3, 3], [4, 4])
    assert engine.messages == second_engine.messages
    assert engine.messages.count("LoadWeights") == 2
    assert len(list(engine.folder.glob("*.safetensors"))) == 0  # removed when all have read it


def test_a_probe_of_fewer_prompts_than_engines_reaches_each(make_run, engine, second_engine):
    run, _ = make_run(*TWO)
    native, _ = make_run()
    answers, expected = answer_probe(run, "The film was"), answer_probe(native, "The film was")
    for model, answer in answers.items():
        assert answer == expected[model] | {"kl": pytest.approx(expected[model]["kl"], abs=1e-5)}
    assert sorted(engine.rows + second_engine.rows) == [0, 1]


@pytest.mark.parametrize("options", [(), ("rollout.transfer=broadcast",)], ids=["file", "group"])
def test_of_two_engines_only_the_one_that_ends_is_replaced_and_asked_again(
    make_run, engine, second_engine, options
):
    native, _ = make_run()
    second_engine.faults = iter([dies_at(LoadWeights), dies_at(Generate)])
    run, _ = make_run(*TWO, *options)
    rollout, expected = (generate_rollout(r, 1) for r in (run, native))
    assert torch.equal(rollout.ids, expected.ids)
    assert (engine.engines, second_engine.engines) == (1, 3)
    assert engine.messages == ["Start", "LoadWeights", "Generate"]
    assert second_engine.messages.count("LoadWeights") == 3


def test_each_engine_may_fail_as_often_as_a_single_one(make_run, engine, second_engine):
    for each in (engine, second_engine):
        each.faults = iter([dies_at(LoadWeights)] * (ATTEMPTS - 1))
    make_run(*TWO)
    assert engine.engines == second_engine.engines == ATTEMPTS
    second_engine.faults = iter([dies_at(Start)] * ATTEMPTS)
    with pytest.raises(RlhfError, match=f"{ATTEMPTS} rollout engines in a row failed"):
        make_run(*TWO)


# -- engines that fail -----------------------------------------------------------------------------


def test_an_engine_that_ends_is_replaced_and_the_step_is_the_same(make_run, engine):
    native, _ = make_run()
    engine.faults = iter([dies_at(Start), dies_at(LoadWeights), dies_at(Generate)])
    run, _ = make_run(VLLM)
    rollout, expected = (generate_rollout(r, 1) for r in (run, native))
    assert torch.equal(rollout.ids, expected.ids)
    assert engine.engines == 4
    assert engine.messages.count("LoadWeights") == 3


def test_an_engine_that_ends_amid_a_batch_generates_its_whole_part_again(
    make_run, engine, second_engine, monkeypatch
):
    """Otherwise other responses would be computed together, and rounding could differ."""
    monkeypatch.setattr(remote_engines, "BUDGET", 1)  # a response in each message
    native, _ = make_run()
    second_engine.faults = iter([dies_at(NextTurns, 2)])
    run, _ = make_run(*TWO)
    rollout, expected = (generate_rollout(r, 1) for r in (run, native))
    assert torch.equal(rollout.ids, expected.ids)
    assert engine.turns == [[0], [1], [2], [3]]
    assert second_engine.turns == [[4], [5], [4], [5], [6], [7]]


def test_an_engine_that_does_not_hold_what_was_sent_is_not_used(make_run, engine):
    refusal = EngineFailed(text="IncompleteUpdateError: the update lacks lm_head.weight")

    def holding(**wrong):
        def reply(message):
            right = {
                "weights_version": message.weights_version,
                "tensors": len(message.tensors),
                "checksum": message.checksum,
            }
            return WeightsLoaded(seconds=0.0, **right | wrong)

        return replies(LoadWeights, reply)

    engine.faults = iter([replies(LoadWeights, lambda _m: refusal), holding(weights_version=7),
                          holding(checksum=(1, 1))])  # fmt: skip
    run, _ = make_run(VLLM)
    assert engine.engines == 4
    assert engine.messages.count("Generate") == 0
    assert len(generate_rollout(run, 1).texts) == 8


def test_a_run_ends_when_engine_after_engine_fails(make_run, engine):
    engine.faults = iter([dies_at(LoadWeights)] * ATTEMPTS)
    with pytest.raises(RlhfError, match=f"{ATTEMPTS} rollout engines in a row failed"):
        make_run(VLLM)


def test_an_environment_without_vllm_is_the_users_to_mend(make_run, engine):
    failed = EngineFailed(text="no module named vllm: make vllm", user_input=True, final=True)
    engine.faults = iter([replies(Start, lambda _m: failed)])
    with pytest.raises(UserInputError, match="make vllm"):
        make_run(VLLM)
    assert engine.engines == 1


def test_a_run_does_not_train_on_responses_of_older_weights(make_run, engine):
    run, _ = make_run(VLLM)
    rollout = generate_rollout(run, 2)
    assert version_lag(rollout, 2) == 0
    old, _ = old_policy_outputs(run, rollout, rollout.rows)
    with pytest.raises(RlhfError, match="weights that are 1 updates old"):
        check_weights(run, 3, rollout, old)
    with pytest.raises(RlhfError, match="does not compute the same model"):
        check_weights(run, 2, rollout, old - 0.01)


def test_weights_by_broadcast_are_those_of_the_policy_for_each_engine(make_run, engine):
    native, _ = make_run()
    engine.faults = iter([dies_at(LoadWeights, after=1)])
    run, _ = make_run(VLLM, "rollout.transfer=broadcast")
    for step in (1, 2):
        (_, ours), (_, theirs) = train_step(run, step), train_step(native, step)
        assert [s.response for s in ours] == [s.response for s in theirs]
    assert engine.engines == 2
    assert not list(engine.folder.glob("*.safetensors"))


def test_a_longer_response_than_the_engine_was_built_for_gets_a_larger_engine(make_run, engine):
    run, _ = make_run(VLLM)
    native, _ = make_run("rollout.max_new_tokens=60")
    run.config = native.config
    rollout, expected = (generate_rollout(r, 1) for r in (run, native))
    assert torch.equal(rollout.ids, expected.ids)
    assert engine.engines == 2


def test_another_number_of_exported_tensors_is_an_incomplete_update(monkeypatch):
    monkeypatch.setattr(received_weights, "gpu_uuid", lambda _device: "the GPU")
    found = from_ipc(pickle.dumps([()]), [("a", [1]), ("b", [1])], "the GPU", torch.device("cpu"))
    with pytest.raises(IncompleteUpdateError, match="1 tensors instead of the 2 announced"):
        next(found)


def test_the_parts_of_a_cuda_handle_are_where_the_installed_torch_has_them():
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    found = names[DEVICE_OF_HANDLE], names[STORAGE_CLASS], *names[COUNTER]
    assert found == ("storage_device", "storage_cls", "ref_counter_handle", "ref_counter_offset")


def test_the_counters_of_exported_memory_are_where_the_installed_torch_has_them():
    # Counters are made on a GPU only, but in the same kind of shared memory as storages of a CPU.
    storage = torch.tensor([5, 0, 7]).untyped_storage()
    _, handle, _ = storage._share_filename_cpu_()
    assert [readers(handle, offset) for offset in range(3)] == [5, 0, 7]
    assert readers(b"/that-was-removed", 0) == 0


@pytest.mark.parametrize(
    ("variable", "settings", "changed"),
    [
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True", True),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True", True),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:False", False),
    ],
)
def test_what_is_exported_leaves_expandable_segments(monkeypatch, variable, settings, changed):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, settings)
    with without_expandable_segments() as found:
        assert found == changed


# -- the weights that are sent ---------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [(), ("lora.rank=4",)], ids=["full", "adapters"])
def test_the_file_has_every_weight_to_the_bit_with_adapters_merged(make_run, tmp_path, adapters):
    run, _ = make_run(*adapters, "train.learning_rate=1e-2")
    train_step(run, 1)
    lm, path = run.policy.lm, tmp_path / "w.safetensors"
    tensors, sums = write_weights(lm, torch.float32, path)
    written = load_file(path)
    assert path.stat().st_size == file_size(lm, torch.float32)
    assert [t.name for t in tensors if t.tied] == ["lm_head.weight"]
    assert set(written) == {t.name for t in tensors} == set(lora.mergeable_weights(lm))
    assert sums == checksum(written[t.name] for t in tensors if not t.tied)
    for layer in lora.adapted_layers(lm):
        layer.merge()
    for name, tensor in lora.base_tensors(lm).items():
        assert torch.allclose(written[name], tensor, atol=1e-6 if adapters else 0, rtol=0), name


def test_weights_that_do_not_fit_into_shared_memory_go_to_the_disk(monkeypatch):
    free = {"/dev/shm/run": 64e6, "/tmp/run": 3e9}  # noqa: S108
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[str(path)]))
    folders = [Path(name) for name in free]
    assert folder_with_room(folders, 1000) == folders[0]
    assert folder_with_room(folders, 65_000_000) == folders[1]
    with pytest.raises(UserInputError, match=r"16 GB, .*0\.064 GB in /dev/shm and 3 GB in /tmp: .*"
                       "--shm-size"):  # fmt: skip
        folder_with_room(folders, 16_000_000_000)


def test_a_checksum_is_that_of_joined_and_padded_matrices_and_of_no_other_weights():
    parts = [torch.randn(3, 5), torch.randn(2, 5)]
    joined = torch.cat([*parts, torch.zeros(4, 5)])
    assert checksum(parts) == checksum([joined])
    assert checksum([parts[0], parts[1].neg()]) != checksum(parts)
    assert checksum([parts[0], parts[0][:2]]) != checksum(parts)
    halves = [p.bfloat16() for p in parts]
    assert checksum(halves) == checksum([torch.cat(halves)])
