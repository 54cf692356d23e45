"""Environments that fail, and scores of theirs."""

import logging
import sys
import threading

import pytest

from engine.errors import CommandRejectedError
from engine.train.environment.environments import checked_reply
from engine.train.reports.probe import answer_probe
from engine.train.rewards.source import RewardCallError
from engine.train.step import train_step
from engine.train.user_code import concurrent_calls
from tests.train.arithmetic import CHAT
from tests.train.repeating import respond

WRONG = {
    "raises": ("def reply(self, text):\n        raise ValueError('no game')", "no game"),
    "asserts": (
        "def reply(self, text):\n        assert False",
        "AssertionError at wrong_asserts_[18].py:3",
    ),
    "exits": ("def reply(self, text):\n        raise SystemExit(3)", "SystemExit"),
    "returns a number": ("def reply(self, text):\n        return 3", "reply returned 3, not text"),
    "returns half a message": (
        "def reply(self, text):\n        return [{'role': 'tool'}]",
        "not text, a list of messages with role and content",
    ),
    "returns half a character": (
        "def reply(self, text):\n        return '\\ud83d'",
        "UnicodeEncodeError",
    ),
    "raises in a coroutine": (
        "async def reply(self, text):\n        raise ValueError('no')",
        "ValueError: no at wrong_raises_in_a_coroutine_[18].py:3",
    ),
    "exits in a coroutine": (
        "async def reply(self, text):\n        raise SystemExit(3)",
        "SystemExit",
    ),
    "cannot reply": ("def answer(self, text):\n        return None", "no method reply"),
    "needs a column": (
        "def __init__(self, secret): ...\n    def reply(self, text): ...",
        "takes 'secret'",
    ),
}


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("case", list(WRONG))
def test_an_environment_that_fails_is_told_in_one_line(make_run, tmp_path, case, concurrency):
    body, expected = WRONG[case]
    name = f"wrong_{case.replace(' ', '_')}_{concurrency}"
    (tmp_path / f"{name}.py").write_text(f"class Wrong:\n    {body}\n")
    run, _ = make_run(
        f"environment.factory={name}:Wrong", f"environment.path={tmp_path}",
        f"environment.concurrency={concurrency}", "environment.max_tokens=8",
    )  # fmt: skip
    with pytest.raises(RewardCallError, match=expected) as raised:
        respond(run)
    text = str(raised.value)
    assert text.startswith(f"environment '{name}:Wrong' at ")
    assert "\n" not in text
    (tmp_path / f"{name}.py").write_text(
        "class Wrong:\n    def reply(self, text):\n        return None\n"
    )
    assert len(respond(run).texts) == run.config.rollout.batch_size  # the file is read again


def test_a_reply_that_the_template_cannot_render_pauses_the_run(make_run, tmp_path):
    """So that the environment can be corrected; its file is read again."""
    refusing = (
        '{% if messages[-1].role == "system" %}{{ raise_exception("system comes first") }}'
        "{% endif %}" + CHAT
    )
    file = tmp_path / "commanding.py"
    text = (
        "class Commanding:\n    def reply(self, text):\n"
        "        return [{'role': 'system', 'content': 'Go on'}]\n"
    )
    file.write_text(text)
    run, _ = make_run(
        "environment.factory=commanding:Commanding", f"environment.path={tmp_path}",
        "environment.max_tokens=60", f"data.chat_template='{refusing}'", "data.chat=true",
    )  # fmt: skip
    with pytest.raises(RewardCallError, match=r"at turn 1 of step 1: .*system comes first"):
        respond(run)
    file.write_text(text.replace("system", "user") + "# corrected\n")
    assert len(respond(run).texts) == run.config.rollout.batch_size


def test_a_reply_can_be_of_a_subclass_of_text():
    class Shout(str):
        def __str__(self):
            return "no"

    said = checked_reply(Shout("Hey"))
    assert (said, type(said)) == ("Hey", str)


def test_a_probe_whose_environment_fails_is_rejected(make_run, tmp_path):
    (tmp_path / "refusing.py").write_text(f"class Wrong:\n    {WRONG['raises'][0]}\n")
    run, _ = make_run(
        "environment.factory=refusing:Wrong", f"environment.path={tmp_path}",
        "environment.max_tokens=8",
    )  # fmt: skip
    with pytest.raises(CommandRejectedError, match=r"a probe cannot be answered: .* no game"):
        answer_probe(run, run.prompts.for_step(1)[0].text)


SCORING = """
class Scoring:
    def reply(self, text):
        return None

    def score(self):
        {body}
"""


def scoring_run(make_run, folder, name, body, *overrides):
    """A run whose environments only give a score, and the file that their class is in."""
    file = folder / f"{name}.py"
    file.write_text(SCORING.format(body=body))
    run, _ = make_run(
        f"environment.factory={name}:Scoring", f"environment.path={folder}",
        "environment.max_tokens=8", "reward.model=null", "reward.environment=score",
        "reward.retries=0", *overrides,
    )  # fmt: skip
    return run, file


@pytest.mark.parametrize("chat", [False, True])
def test_a_score_that_fails_is_told_with_its_response(make_run, tmp_path, chat):
    as_chat = (f"data.chat_template='{CHAT}'", "data.chat=true") if chat else ()
    run, file = scoring_run(
        make_run, tmp_path, f"failing_{chat}", "raise TypeError('no score')", *as_chat
    )
    with pytest.raises(RewardCallError) as raised:
        train_step(run, 1)
    text = str(raised.value)
    what = f"TypeError: no score at failing_{chat}.py:"
    assert text.startswith(f"reward 'score' at step 1: {what}")
    assert " (response 0, prompt: " in text
    assert "\n" not in text
    file.write_text(SCORING.format(body="return 1.0  # corrected"))
    metrics, _ = train_step(run, 1)  # the file is read again
    assert metrics["objective/scores"] == 1


def test_a_score_that_does_not_return_in_time_is_told_at_once_with_where_it_is(
    make_run, tmp_path, monkeypatch
):
    ends = []
    monkeypatch.setattr(threading, "ends", ends, raising=False)
    run, file = scoring_run(
        make_run, tmp_path, "late",
        "import threading\n"
        "        threading.ends.append(threading.Event())\n"
        "        threading.ends[-1].wait()  # here",
        "environment.timeout=0.5", "reward.retries=3",
    )  # fmt: skip
    limit = (
        r"reward 'score' at step 1: no return within 0\.5 s, the limit of environment\.timeout "
        r"\(called with '"
    )
    try:
        with pytest.raises(RewardCallError, match=limit) as raised:
            train_step(run, 1)
        assert "wait()  # here" in raised.value.trace
        assert len(ends) == 1
    finally:
        for end in ends:
            end.set()
    file.write_text(SCORING.format(body="return 1.0  # corrected"))
    metrics, _ = train_step(run, 1)  # the file is read again
    assert metrics["objective/scores"] == 1


def test_an_environment_without_the_method_of_the_score_fails_before_the_first_turn(
    make_run, tmp_path
):
    run, _ = scoring_run(make_run, tmp_path, "scoreless", "return 1.0", "reward.environment=points")
    with pytest.raises(RewardCallError, match="it made Scoring, which has no method points"):
        respond(run)


def test_a_score_that_closes_the_streams_leaves_them_to_the_rank(make_run, tmp_path):
    run, _ = scoring_run(
        make_run, tmp_path, "closing", "import sys; sys.stdout.close(); return 1.0"
    )
    train_step(run, 1)
    assert not sys.stdout.closed


@pytest.mark.parametrize("concurrency", [1, 8])
def test_an_environment_that_takes_long_is_told_while_it_is_waited_for(
    make_run, tmp_path, monkeypatch, concurrency
):
    name = f"waiting_{concurrency}"
    (tmp_path / f"{name}.py").write_text(
        "import threading\n"
        "told = threading.Event()\n"
        "class Waiting:\n"
        "    def reply(self, text):\n"
        "        assert told.wait(60)\n"
    )
    run, _ = make_run(
        f"environment.factory={name}:Waiting", f"environment.path={tmp_path}",
        f"environment.concurrency={concurrency}", "environment.max_tokens=8",
    )  # fmt: skip
    monkeypatch.setattr(concurrent_calls, "LONG_CALL", 0.1)
    records = []

    class Telling(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())
            sys.modules[name].told.set()

    handler = Telling()
    logging.getLogger("engine").addHandler(handler)
    try:
        respond(run)
    finally:
        logging.getLogger("engine").removeHandler(handler)
    (text,) = records
    assert text.startswith(
        f"environment '{name}:Waiting' at turn 1 of step 1 has not returned for 1 s (called with '"
    )


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("def __init__(self)", "end.wait()"),
        ("def reply(self, text)", "end.wait()"),
        ("async def reply(self, text)", "await asyncio.to_thread(end.wait)"),
    ],
)
def test_a_call_that_does_not_return_in_time_is_told_with_where_it_is(
    make_run, tmp_path, where, call, concurrency
):
    name = f"hanging_{where.partition('(')[0].replace(' ', '_')}_{concurrency}"
    corrected = "class Hanging:\n    def reply(self, text):\n        return None\n"
    (tmp_path / f"{name}.py").write_text(
        "import asyncio, threading\nend = threading.Event()\n"
        + corrected
        + f"    {where}:\n        {call}  # here\n"
    )
    run, _ = make_run(
        f"environment.factory={name}:Hanging", f"environment.path={tmp_path}",
        f"environment.concurrency={concurrency}", "environment.max_tokens=8",
        "environment.timeout=0.5",
    )  # fmt: skip
    limit = r"no return within 0\.5 s, the limit of environment\.timeout \(called with '"
    try:
        with pytest.raises(RewardCallError, match=limit) as raised:
            respond(run)
        assert str(raised.value).startswith(f"environment '{name}:Hanging' at ")
        assert f"{call}  # here" in raised.value.trace
        assert "call_each" not in raised.value.trace
    finally:
        sys.modules[name].end.set()
    (tmp_path / f"{name}.py").write_text(corrected)
    assert len(respond(run).texts) == run.config.rollout.batch_size  # the file is read again
