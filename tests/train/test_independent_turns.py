"""Responses whose turns do not wait for each other, with an engine's stand-in."""

import sys
import threading

import pytest
import torch

from engine.protocol.rollout.messages import EndedTurn, NextTurns
from engine.train.environment.response import FinishedResponse, Limits, Response
from engine.train.experience.generation import generate_rollout
from engine.train.reports.probe import answer_probe
from engine.train.rewards.source import RewardCallError
from engine.train.rollout.conversation import SampledTurn
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.rollout.vllm.remote_engine import sampled_turn
from engine.train.step import train_step
from engine.train.user_code import concurrent_calls
from tests.train.arithmetic import CHATTING
from tests.train.repeating import ENVIRONMENT, SCORED, STOPS, respond
from tests.train.test_rollout_engine import dies_at

VLLM = "rollout.engine=vllm"
INDEPENDENT = (VLLM, "environment.turns=independent")


def written(factory, folder):
    """Keys for an environment in a file of the folder, whose responses are independent."""
    return (f"environment.factory={factory}", f"environment.path={folder}",
            "environment.max_tokens=40", *INDEPENDENT)  # fmt: skip


def same(one, other):
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.ended, other.ended)
    assert torch.allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert torch.equal(one.conversation.ids, other.conversation.ids)
    assert torch.equal(one.conversation.positions, other.conversation.positions)
    for ours, theirs in zip(one.conversation.turns, other.conversation.turns, strict=True):
        assert ours.messages == theirs.messages
        assert ours.environment.heard == theirs.environment.heard


@pytest.fixture
def together(make_run):
    """The responses of native rollouts, which take their turns together."""
    run, _ = make_run(*ENVIRONMENT, STOPS)
    return respond(run)


def test_the_responses_are_those_that_take_their_turns_together(make_run, engine, together):
    run, _ = make_run(*ENVIRONMENT, STOPS, *INDEPENDENT)
    same(respond(run), together)
    assert len(engine.turns[0]) == len(together.texts)
    assert engine.messages.count("Generate") == 1


def test_two_engines_generate_the_turns_of_one(make_run, engine, second_engine, together):
    run, _ = make_run(*ENVIRONMENT, STOPS, *INDEPENDENT, "rollout.engines=2")
    same(respond(run), together)
    half = len(together.texts) // 2
    assert {row for turns in engine.turns for row in turns} == set(range(half))
    assert {row for turns in second_engine.turns for row in turns} == set(range(half, 2 * half))


def test_the_responses_of_an_engine_that_is_lost_are_taken_by_the_other_at_once(
    make_run, engine, second_engine, tmp_path
):
    """The first environment replies only when one of the lost engine's responses has a turn."""
    (tmp_path / "waiting_for_lost.py").write_text(
        "import itertools, threading\n"
        "numbers, over = itertools.count(), threading.Event()\n"
        "class Waiting:\n"
        "    def __init__(self):\n"
        "        self.number = next(numbers)\n"
        "    def reply(self, text):\n"
        "        if self.number == 0:\n"
        "            assert over.wait(30)\n"
        "        elif self.number >= 2:\n"
        "            over.set()\n"
    )
    second_engine.faults = iter([dies_at(NextTurns)])
    run, _ = make_run(
        *written("waiting_for_lost:Waiting", tmp_path), "rollout.engines=2", "rollout.batch_size=4"
    )
    assert len(respond(run).texts) == 4
    assert sorted(row for turns in engine.turns for row in turns) == [0, 1, 2, 3]
    assert not second_engine.turns


@pytest.mark.parametrize("after", [0, 1])
def test_responses_that_another_engine_generates_are_the_same(
    make_run, engine, second_engine, together, after
):
    second_engine.faults = iter([dies_at(NextTurns, after)])
    run, _ = make_run(*ENVIRONMENT, STOPS, *INDEPENDENT, "rollout.engines=2")
    same(respond(run), together)


def test_two_engines_that_are_lost_are_both_replaced(make_run, engine, second_engine, together):
    for each in (engine, second_engine):
        each.faults = iter([dies_at(NextTurns, 1)])
    run, _ = make_run(*ENVIRONMENT, STOPS, *INDEPENDENT, "rollout.engines=2")
    same(respond(run), together)
    assert engine.engines == second_engine.engines == 2


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_engine_that_ends_is_replaced_and_no_environment_gets_a_turn_twice(
    make_run, engine, together, after
):
    engine.faults = iter([dies_at(NextTurns, after)])
    run, _ = make_run(*ENVIRONMENT, STOPS, *INDEPENDENT)
    same(respond(run), together)
    assert engine.engines == 2


def test_responses_go_on_while_another_one_waits_for_its_environment(make_run, engine, tmp_path):
    """The first environment that is asked replies only when another has had its last turn."""
    (tmp_path / "waiting.py").write_text(
        "import itertools, threading\n"
        "numbers, over = itertools.count(), threading.Event()\n"
        "class Waiting:\n"
        "    def __init__(self):\n"
        "        self.first = next(numbers) == 0\n"
        "        self.turns = 0\n"
        "    def reply(self, text):\n"
        "        self.turns += 1\n"
        "        if self.first:\n"
        "            assert over.wait(60)\n"
        "        elif self.turns == 3:\n"
        "            over.set()\n"
        "        return ' What else?'\n"
    )
    run, _ = make_run(
        *written("waiting:Waiting", tmp_path), "environment.max_turns=3", STOPS,
        "rollout.max_new_tokens=60",
    )  # fmt: skip
    turns = [turns.count for turns in respond(run).conversation.turns]
    assert 3 in turns[1:]


FAILS = "import threading\nend = threading.Event()\n\nclass Failing:\n    turns = 0\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise ValueError('no game')", "ValueError: no game"),
        ("raise SystemExit(3)", "SystemExit"),
        ("return 3", "reply returned 3, not text"),
        ("end.wait()", r"no return within 0\.5 s"),
    ],
)
def test_an_error_in_a_later_turn_ends_all_of_them_and_the_engine_goes_on(
    make_run, engine, tmp_path, body, expected
):
    name = f"failing_{'_'.join(w for w in body.split() if w.isalpha())}_{len(body)}"
    path = tmp_path / f"{name}.py"
    path.write_text(
        f"{FAILS}    def reply(self, text):\n        self.turns += 1\n"
        f"        if self.turns == 1:\n            return ' What else?'\n        {body}\n"
    )
    run, _ = make_run(*written(f"{name}:Failing", tmp_path), "environment.timeout=0.5", STOPS)
    try:
        with pytest.raises(RewardCallError, match=expected) as raised:
            respond(run)
        assert str(raised.value).startswith(f"environment '{name}:Failing' at turn 2 of step 1: ")
        assert "SystemExit" in expected or "called with '" in str(raised.value)
    finally:
        sys.modules[name].end.set()
    path.write_text(f"{FAILS}    def reply(self, text):\n        return None\n")
    assert len(respond(run).texts) == run.config.rollout.batch_size
    assert engine.engines == 1


def test_an_engine_that_forgets_weights_gets_them_again_after_an_error(make_run, engine, tmp_path):
    (tmp_path / "failing_once.py").write_text(
        "class Failing:\n"
        "    fails = True\n"
        "    def reply(self, text):\n"
        "        if Failing.fails:\n"
        "            raise ValueError('no game')\n"
    )
    run, _ = make_run(*written("failing_once:Failing", tmp_path), "rollout.sleep=2")
    with pytest.raises(RewardCallError):
        respond(run)
    sys.modules["failing_once"].Failing.fails = False
    respond(run)
    assert engine.messages.count("LoadWeights") == 2
    assert engine.engines == 1


def test_an_error_ends_the_step_while_another_environment_hangs(make_run, engine, tmp_path):
    (tmp_path / "one_hangs.py").write_text(
        "import itertools, threading\n"
        "numbers, hangs, end = itertools.count(), threading.Event(), threading.Event()\n"
        "class Failing:\n"
        "    def __init__(self):\n"
        "        self.first = next(numbers) == 0\n"
        "    def reply(self, text):\n"
        "        if self.first:\n"
        "            hangs.set()\n"
        "            end.wait()\n"
        "        hangs.wait()\n"
        "        raise ValueError('no game')\n"
    )
    run, _ = make_run(
        *written("one_hangs:Failing", tmp_path), "environment.timeout=0.5",
    )  # fmt: skip
    raised = []

    def answer():
        with pytest.raises(RewardCallError) as caught:
            respond(run)
        raised.append(str(caught.value))

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(60)
    sys.modules["one_hangs"].end.set()
    assert "ValueError: no game" in raised[0]


def test_progress_is_that_of_the_tokens_also_while_environments_are_waited_for(
    make_run, engine, tmp_path
):
    (tmp_path / "watched.py").write_text(
        "import threading\n"
        "asked, end = threading.Event(), threading.Event()\n"
        "class Watched:\n"
        "    def reply(self, text):\n"
        "        asked.set()\n"
        "        assert end.wait(60)\n"
    )
    run, _ = make_run(
        *written("watched:Watched", tmp_path),
    )  # fmt: skip
    watched, waiting = sys.modules["watched"], []

    def report(*progress):
        if watched.asked.is_set():
            waiting.append(progress)
        if len(waiting) == 3:
            watched.end.set()

    rollout = generate_rollout(run, 1, report)
    total = len(rollout.texts) * run.config.rollout.max_new_tokens
    assert {of for _, of in waiting} == {total}


def test_a_rank_says_so_while_an_engine_generates_turns(make_run, engine):
    """Otherwise it, and the ranks that wait for it, would be taken for ones that hang."""
    said, reports = threading.Event(), []

    def generates(message):
        if isinstance(message, NextTurns) and not said.wait(30):
            raise ConnectionError

    engine.faults = iter([generates])
    run, _ = make_run(*ENVIRONMENT, STOPS, *INDEPENDENT)
    tokens = run.config.rollout.batch_size * run.config.rollout.max_new_tokens

    def report(_done, total):
        if total == tokens:
            reports.append(total)
        if len(reports) == 2:
            said.set()

    generate_rollout(run, 1, report)
    assert engine.engines == 1


def test_a_step_and_a_probe_have_conversations(make_run, engine):
    run, _ = make_run(*ENVIRONMENT, *SCORED, STOPS, *INDEPENDENT)
    metrics, _ = train_step(run, 1)
    assert metrics["environment/turns"] > 1
    assert 0 <= metrics["time/environment"] <= metrics["time/generate"]
    before = len(engine.turns)
    answer_probe(run, run.prompts.for_step(1)[0].text)
    assert len(engine.turns) > before


def test_tools_are_called_as_in_responses_that_take_their_turns_together(make_run, engine):
    run, _ = make_run(*CHATTING, *INDEPENDENT)
    native, _ = make_run(*CHATTING)
    ours, theirs = respond(run), respond(native)
    assert torch.equal(ours.conversation.ids, theirs.conversation.ids)
    found = [[(t.messages, t.tool_calls, t.failed_calls) for t in rollout.conversation.turns]
             for rollout in (ours, theirs)]  # fmt: skip
    assert found[0] == found[1]
    assert any(calls for _, calls, _ in found[0])


def test_a_call_that_takes_long_is_told_with_its_turn(make_run, engine, tmp_path, monkeypatch,
                                                      caplog):  # fmt: skip
    (tmp_path / "slow_turn.py").write_text(
        "import logging, threading\n"
        "class Told(logging.Handler):\n"
        "    event = threading.Event()\n"
        "    def emit(self, record):\n"
        "        if 'has not returned' in record.getMessage():\n"
        "            self.event.set()\n"
        "told = Told()\n"
        "logging.getLogger('engine').addHandler(told)\n"
        "class Slow:\n"
        "    def reply(self, text):\n"
        "        assert told.event.wait(60)\n"
    )
    run, _ = make_run(
        *written("slow_turn:Slow", tmp_path),
    )  # fmt: skip
    monkeypatch.setattr(concurrent_calls, "LONG_CALL", 0.1)
    try:
        respond(run)
    finally:
        sys.modules["slow_turn"].logging.getLogger("engine").removeHandler(
            sys.modules["slow_turn"].told
        )
    texts = [r.getMessage() for r in caplog.records if "has not returned" in r.getMessage()]
    assert len(texts) == 1
    assert texts[0].startswith("environment 'slow_turn:Slow' at turn 1 of step 1 has not returned")


def test_a_turn_has_float32_numbers_whatever_dtype_an_environment_makes_the_default(tokenizer):
    ended = EndedTurn(0, [5, 6], bytes(8), bytes(8))
    torch.set_default_dtype(torch.float64)
    try:
        turn = sampled_turn(ended, StopCriteria([1], [], tokenizer), 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert turn.floats.dtype == torch.float32  # of which the other ranks get the bytes


def test_a_finished_response_is_the_same_on_another_rank(make_run, tokenizer):
    run, _ = make_run()
    prompt = run.prompts.for_step(1)[0]
    limits = Limits(turns=3, tokens=10, reply_tokens=10)
    ours, theirs = Response(prompt, object(), limits), Response(prompt, None, limits)
    for row, version in ((0, 3), (0, 4)):
        ours.add_turn(SampledTurn(row, [5, 6], torch.rand(3, 2), False, True, version), tokenizer)
        ours.add_reply([7], [{"role": "user", "content": "?"}])
    FinishedResponse.of(ours).copy_to(theirs)
    assert torch.equal(torch.cat(theirs.floats, 1), torch.cat(ours.floats, 1))
    for name in ("ids", "positions", "messages", "sampled", "replies", "eos", "ended", "version"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert theirs.environment is None
