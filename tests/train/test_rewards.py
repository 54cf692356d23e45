"""Reward functions and other sources: how they are called, and errors."""

import importlib
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.reward import SOURCE_KEYS, RewardConfig, RewardSource
from engine.errors import UserInputError
from engine.progress import report_nothing
from engine.protocol import frames
from engine.protocol.rank_messages import Paused, decode_from_rank
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.failure import failed_message
from engine.train.rewards import calls
from engine.train.rewards.kinds.function import FunctionReward
from engine.train.rewards.mix import KINDS, RewardMix, WeightedReward, load_rewards
from engine.train.rewards.source import LoadContext, RewardCallError, RunsOn

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of reward functions; returns the folder."""
    path = tmp_path / "rewards_for_test.py"
    path.write_text(
        "def length(completions, **kwargs): return [float(len(c)) for c in completions]\n"
        "def lower(completions, **kwargs): return [float(len(c.lower())) for c in completions]\n"
        "def sometimes(completions, gold): return [None if g else 1.5 for g in gold]\n"
        "async def slow(completion_ids, **kwargs): return [len(c) for c in completion_ids]\n"
        "def nan(completions, **kwargs): return [float('nan')] * len(completions)\n"
        "def short(completions, **kwargs): return [1.0]\n"
        "def words(completions, **kwargs): return ['good'] * len(completions)\n"
        "def nothing(completions, **kwargs): completions.clear()\n"
        "def one(completions, **kwargs): return 1.0\n"
        "def named(completions, **kwargs): return {'scores': [1.0] * len(completions)}\n"
        "def wide(completions, **kwargs): return [1e39] * len(completions)\n"
        "def huge(completions, **kwargs): return [10**400] * len(completions)\n"
        "def vast(completions, **kwargs): return [10**5000] * len(completions)\n"
        "def surrogate(completions, **kwargs): raise ValueError('no \\\\ud800 here')\n"
        "calls = []\n"
        "def fails_twice(completions, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) < 3: raise OSError('no service')\n"
        "    return [1.0] * len(completions)\n"
        "def stumbles(completions, **kwargs):\n"
        "    for text in completions:\n"
        "        if 'bad' in text: raise ValueError('not \\n nice')\n"
        "class Rude(Exception):\n"
        "    def __str__(self): raise KeyError\n"
        "def rude(**kwargs): raise Rude\n"
        "def exits(**kwargs): raise SystemExit(3)\n"
        "def wordy(**kwargs): raise ValueError('no' * 40_000_000)\n"
        "def needs(completions, label, **kwargs): return [0.0] * len(completions)\n"
        "def settings(completions, **kwargs):\n"
        "    import torch\n"
        "    torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n"
        "    torch.set_num_threads(torch.get_num_threads() + 1)\n"
        "    torch.set_float32_matmul_precision('medium')\n"
        "    return [0.0] * len(completions)\n"
        "def closes(completions, **kwargs):\n"
        "    import sys\n"
        "    print('scoring')\n"
        "    sys.stdout.close()\n"
        "    sys.stderr.close()\n"
        "    return [0.0] * len(completions)\n"
        "def prints(completions, **kwargs):\n"
        "    print('scoring ' * 10_000)\n"
        "    print('scored', end='')\n"
        "    return [0.0] * len(completions)\n"
        "def closes_files(completions, **kwargs):\n"
        "    import os\n"
        "    print('scoring', end='')\n"
        "    os.close(1)\n"
        "    os.close(2)\n"
        "    return [0.0] * len(completions)\n"
        "def appends(prompts, completions, completion_ids, notes):\n"
        "    for i, messages in enumerate(prompts):\n"
        "        messages += completions[i]\n"
        "        completion_ids[i].append(0)\n"
        "        notes[i]['seen'] = True\n"
        "    return [len(messages) for messages in prompts]\n"
        "def ended(child):\n"
        "    child.terminate()\n"
        "    child.join(20)\n"
        "    code = child.exitcode\n"
        "    child.kill()\n"
        "    return code or 0\n"
        "def terminates(completions, **kwargs):\n"
        "    import multiprocessing, subprocess, time\n"
        "    fork = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))\n"
        "    fork.start()\n"
        "    other = subprocess.Popen(['sleep', '600'])\n"
        "    other.terminate()\n"
        "    try: code = other.wait(20)\n"
        "    except subprocess.TimeoutExpired: code = 0\n"
        "    other.kill()\n"
        "    return [ended(fork), code, None]\n"
        "def forks(completions, **kwargs):\n"
        "    import os\n"
        "    children = []\n"
        "    for error in (SystemExit(0), ValueError('no'), None):\n"
        "        children.append(os.fork())\n"
        "        if children[-1] == 0:\n"
        "            if error: raise error\n"
        "            return [0.0] * len(completions)\n"
        "    return [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]\n"
        "def step(trainer_state, prompts, **kwargs):\n"
        "    return [trainer_state.global_step] * len(prompts)\n",
        encoding="utf-8",
    )
    yield str(tmp_path)
    sys.modules.pop("rewards_for_test", None)
    sys.path[:] = [p for p in sys.path if p != str(tmp_path)]


def function_reward(module, name):
    return FunctionReward(f"rewards_for_test:{name}", module)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("length", [11, 34, 3]), ("sometimes", [1.5, None, None]), ("step", [7, 7, 7])],
)
def test_a_function_is_called_by_keyword_with_columns_and_state(module, inputs, name, expected):
    assert function_reward(module, name)(inputs, report_nothing) == expected


def test_an_argument_that_is_not_a_column_is_named_beside_the_columns_there_are(module, inputs):
    columns = ", ".join(inputs.batch.prompts[0].row)
    with pytest.raises(TypeError, match=f"takes 'label', which is not one of {columns}, prompts"):
        function_reward(module, "needs")(inputs, report_nothing)


def test_a_process_that_a_function_forks_does_not_return_from_it(module, inputs):
    reward, rank = function_reward(module, "forks"), os.getpid()
    try:
        codes = reward(inputs, report_nothing)
    finally:
        if os.getpid() != rank:
            os._exit(77)
    assert codes == [1, 1, 1]


def test_torch_settings_that_a_function_changes_are_restored(module, inputs):
    def settings():
        return (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
        )  # fmt: skip

    before = settings()
    try:
        function_reward(module, "settings")(inputs, report_nothing)
        after = settings()
    finally:  # or the other tests would run with them
        torch.set_grad_enabled(before[0])
        torch.set_default_dtype(before[1])
        torch.set_num_threads(before[2])
        torch.set_float32_matmul_precision(before[3])
    assert after == before


@pytest.mark.parametrize(("name", "said"), [("closes", "scoring\n"), ("closes_files", "scoring")])
def test_a_function_may_close_standard_output_and_error(
    module, inputs, capfd, monkeypatch, name, said
):
    # The rank's: closing pytest's own would end the tests.
    for fd, stream in ((1, "stdout"), (2, "stderr")):
        monkeypatch.setattr(sys, stream, os.fdopen(fd, "w", closefd=False))
    reward = function_reward(module, name)
    for _ in range(2):
        assert reward(inputs, report_nothing) == [0.0] * 3
    for stream in (sys.stdout, sys.stderr):
        stream.write("the rank goes on\n")
        stream.flush()
    assert capfd.readouterr() == (said * 2 + "the rank goes on\n", "the rank goes on\n")


def test_a_function_may_print_while_the_log_s_disk_is_full(module, inputs):
    """The journal waits for room, and the run goes on; it does not pause for the reward."""
    reward, before = function_reward(module, "prints"), os.dup(1)
    with Path("/dev/full").open("w") as full:
        os.dup2(full.fileno(), 1)
        try:
            assert reward(inputs, report_nothing) == [0.0] * 3
        finally:
            os.dup2(before, 1)
            os.close(before)


def test_what_a_function_changes_of_its_arguments_is_its_own(module, inputs):
    messages = [{"role": "user", "content": "The film"}]
    prompt = Prompt([1], "The film", {"notes": {}}, messages)
    shared = replace(inputs, batch=batch_prompts([prompt], 3, 0))
    ids = [list(row) for row in inputs.ids]
    assert function_reward(module, "appends")(shared, report_nothing) == [2, 2, 2]
    assert (len(messages), shared.ids, prompt.row) == (1, ids, {"notes": {}})


def test_a_function_can_terminate_its_processes_in_a_rank_that_ignores_the_signal(module, inputs):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank does
    try:
        context = LoadContext(RewardConfig(path=module), {}, SINGLE_RANK)
        source = RewardSource(function="rewards_for_test:terminates")
        reward = KINDS["function"].load(source, context)
        os.kill(os.getpid(), signal.SIGTERM)  # still ignored
        assert reward(inputs, report_nothing) == [-signal.SIGTERM, -signal.SIGTERM, None]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_coroutine_function_is_awaited(module, inputs):
    assert function_reward(module, "slow")(inputs, report_nothing) == [
        len(ids) for ids in inputs.ids
    ]


def test_every_key_that_selects_a_source_has_a_loader_and_every_loader_has_a_key():
    assert tuple(KINDS) == SOURCE_KEYS
    fields = {f.name for f in msgspec.structs.fields(RewardConfig)}
    assert fields >= set(SOURCE_KEYS)
    assert {f.name for f in msgspec.structs.fields(RewardSource)} >= set(SOURCE_KEYS)
    for section in (RewardConfig, RewardSource):  # docs/configuration.md shows these docstrings
        assert all(f"`{key}`" in section.__doc__ for key in SOURCE_KEYS)


def test_a_file_in_the_working_directory_does_not_take_the_place_of_the_configuration_s(
    module, inputs, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = "def length(completions, **_):\n    return [-5.0] * len(completions)\n"
    (elsewhere / "rewards_for_test.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    assert -5.0 not in function_reward(module, "length")(inputs, report_nothing)


def test_a_file_named_like_a_module_of_python_is_a_source_and_hides_no_other_module(
    module, inputs, tmp_path, monkeypatch
):
    text = "def score(completions, **_):\n    return [-5.0] * len(completions)\n"
    for name in ("tabnanny", "colorsys"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    assert FunctionReward("tabnanny:score", module)(inputs, report_nothing) == [-5.0] * 3
    del sys.modules["tabnanny"]
    assert hasattr(importlib.import_module("colorsys"), "rgb_to_hsv")


def test_equally_named_sources_of_a_mix_are_numbered(module, inputs, tokenizer):
    function = RewardSource(function="rewards_for_test:length")
    sources = [function, RewardSource(model="starter:reward"), function]
    mix = load_rewards(
        LoadContext(RewardConfig(mix=sources, path=module), tokenizer.get_vocab(), SINGLE_RANK)
    )
    parts = mix(inputs).parts
    assert list(parts) == ["length", "reward", "length-2"]


BAD = {
    "nan": "returned nan for response 0 of step 7",
    "short": "returned 1 scores for 3 responses",
    "words": "returned 'good' for response 0",
    "nothing": "reward 'nothing' returned None at step 7: it must return a list of 3 scores",
    "one": "reward 'one' returned 1.0 at step 7: it must return a list of 3 scores",
    "named": "returned {'scores': .*} at step 7: it must return a list of 3 scores",
    "wide": "returned 1e\\+39 for response 0",
    "huge": "returned 10000.*… for response 0",
    "vast": "returned a huge integer for response 0",
    "sometimes": "no reward source scored response 1",
}


@pytest.mark.parametrize(("name", "message"), BAD.items())
def test_invalid_scores_raise_an_error_that_names_the_response(module, inputs, name, message):
    with pytest.raises(RewardCallError, match=message):
        source = WeightedReward(1.0, RunsOn.RANK_0, function_reward(module, name))
        RewardMix({name: source}, SINGLE_RANK)(inputs)


@pytest.mark.parametrize("name", ["nan", "sometimes"])
def test_a_function_whose_scores_cannot_be_used_is_not_called_again_until_its_file_is_mended(
    module, inputs, name
):
    source = WeightedReward(1.0, RunsOn.RANK_0, function_reward(module, name))
    mix = RewardMix({name: source}, SINGLE_RANK, retries=3)
    with pytest.raises(RewardCallError):
        mix(inputs)
    mended = f"def {name}(completions, **kwargs): return [2.0] * len(completions)\n"
    Path(module, "rewards_for_test.py").write_text(mended, encoding="utf-8")
    assert mix(inputs).total.tolist() == [2.0] * 3


@pytest.fixture
def call(inputs, monkeypatch):
    """Calls a reward function with up to three retries that do not wait; returns the scores."""
    monkeypatch.setattr(calls, "FIRST_DELAY", 0.0)

    def call_with_retries(reward, **options):
        mix = RewardMix({"r": WeightedReward(1.0, RunsOn.RANK_0, reward)}, SINGLE_RANK, 3)
        return mix(inputs, **options).total.tolist()

    return call_with_retries


def test_a_function_that_raises_is_called_again(module, call):
    assert call(function_reward(module, "fails_twice")) == [1.0] * 3


def test_all_ranks_learn_of_each_call_so_that_none_waits_for_several(module, call, monkeypatch):
    told = []
    monkeypatch.setattr(SINGLE_RANK, "broadcast_bytes", lambda data: told.append(data) or data)
    call(function_reward(module, "fails_twice"))
    assert len(told) == 3


def test_the_wait_before_a_further_call_doubles_up_to_a_minute():
    assert list(calls.retry_delays(8)) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_probe_does_not_call_a_function_again(module, call):
    with pytest.raises(RewardCallError, match="no service"):
        call(function_reward(module, "fails_twice"), retry=False)


RAISING = {
    "stumbles": "reward 'r' at step 7: ValueError: not nice "
    "(response 1, prompt: 'The film', response: ' was bad, and long, and bad again.')",
    "rude": "Rude: (its message cannot be shown: KeyError)",
    "surrogate": r"ValueError: no \ud800 here",
    "exits": "SystemExit: 3 (called with 3 responses, first prompt: 'The film')",
    "wordy": "ValueError: nonono",
}


@pytest.mark.parametrize(("name", "message"), RAISING.items())
def test_what_a_function_raises_is_reported_with_step_and_response(module, call, name, message):
    with pytest.raises(RewardCallError) as caught:
        call(function_reward(module, name))
    assert message in re.sub(r" at rewards_for_test\.py:\d+", "", str(caught.value))
    assert "Traceback" in caught.value.trace
    paused = Paused(step=7, rule="r", reason=str(caught.value), traceback=caught.value.trace)
    for sent in (paused, failed_message(caught.value, None, 0)):
        assert decode_from_rank(frames.encode(sent)[frames.HEADER.size :]) == sent


def test_an_error_names_the_line_of_the_function_and_its_traceback_begins_there(module, call):
    lines = (Path(module) / "rewards_for_test.py").read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "not \\n nice" in line)
    named = rf"not nice at rewards_for_test\.py:{number} \("
    with pytest.raises(RewardCallError, match=named) as caught:
        call(function_reward(module, "stumbles"))
    first_call = caught.value.trace.splitlines()[1]
    assert f'rewards_for_test.py", line {number}' in first_call


def test_the_error_of_a_function_for_texts_says_that_completions_are_messages(module, inputs):
    mix = RewardMix(
        {"r": WeightedReward(1.0, RunsOn.RANK_0, function_reward(module, "lower"))}, SINGLE_RANK, 0
    )
    mix(inputs)
    messages = [{"role": "user", "content": "The film"}]
    prompts = [replace(prompt, messages=messages) for prompt in inputs.batch.prompts]
    conversations = replace(inputs, batch=replace(inputs.batch, prompts=prompts))
    with pytest.raises(RewardCallError, match="each completion is a list of messages"):
        mix(conversations)


def test_a_function_whose_file_was_mended_is_imported_again(module, call):
    reward = function_reward(module, "stumbles")
    file = Path(module) / "rewards_for_test.py"
    whole = file.read_text(encoding="utf-8")
    with pytest.raises(RewardCallError, match="not nice"):
        call(reward)
    file.write_text("def stumbles(", encoding="utf-8")
    with pytest.raises(RewardCallError, match="SyntaxError"):
        call(reward)
    file.write_text(whole + "def stumbles(completions): return [2, 3, 4]\n", encoding="utf-8")
    assert call(reward) == [2, 3, 4]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("math:nope", "no function"),
    ],
)
def test_a_function_that_does_not_exist_is_an_input_error(source, message):
    with pytest.raises(UserInputError, match=message):
        FunctionReward(source, None)


def test_a_module_that_ends_the_interpreter_is_an_input_error(tmp_path):
    (tmp_path / "ending_for_test.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserInputError, match=r"cannot import .*SystemExit: 0"):
        FunctionReward("ending_for_test:f", str(tmp_path))


def test_a_function_may_be_in_a_module_without_a_file():
    FunctionReward("sys:exit", None)


@pytest.mark.parametrize("kind", ["model", "function"])
def test_a_source_that_cannot_be_loaded_is_named_by_its_key(tmp_path, tokenizer, kind):
    bad = RewardSource(**{kind: str(tmp_path) if kind == "model" else "no_such_module:score"})
    for config, evaluated, key in (
        (RewardConfig(**{kind: getattr(bad, kind)}), None, f"reward.{kind}:"),
        (
            RewardConfig(mix=[RewardSource(model="starter:reward"), bad]),
            None,
            f"reward.mix[1].{kind}:",
        ),
        (RewardConfig(model="starter:reward"), [bad], f"eval.rewards[0].{kind}:"),
    ):
        with pytest.raises(UserInputError) as caught:
            load_rewards(LoadContext(config, tokenizer.get_vocab(), SINGLE_RANK), evaluated)
        assert str(caught.value).startswith(key)
