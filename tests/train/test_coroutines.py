"""Coroutines of the user's: reward functions, environments and tools may be asynchronous."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.config.sections.environment import EnvironmentConfig
from engine.train.environment.tool_calls import ToolCall
from engine.train.environment.tools import Tools
from engine.train.rewards.source import RewardInputs
from engine.train.user_code.coroutines import result_of
from tests.train.repeating import ENVIRONMENT, STOPS, respond

ASYNC = """
import asyncio
from repeating import Repeating

class Asking(Repeating):
    async def reply(self, text):
        await asyncio.sleep(0)
        return super().reply(text)

    async def letters(self):
        return super().letters()

async def made(prompt, seed):
    return Asking(prompt, seed)
"""


def test_a_value_that_is_not_awaitable_is_returned_as_it_is():
    given = object()
    assert result_of(given) is given


def test_coroutines_of_all_threads_run_in_one_event_loop_and_at_the_same_time():
    async def meet(barrier):
        await barrier.wait()  # for the other one
        return asyncio.get_running_loop()

    async def of_two():
        return asyncio.Barrier(2)

    barrier = result_of(of_two())
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: result_of(meet(barrier)), range(2), timeout=60)
    assert one is other


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_what_a_coroutine_raises_is_raised_where_its_result_is_wanted(error):
    async def fail():
        raise error

    async def succeed():
        return 1

    with pytest.raises(type(error)) as raised:
        result_of(fail())
    assert raised.value is error
    assert result_of(succeed()) == 1  # the event loop goes on


def test_a_process_that_a_coroutine_forks_ends_with_it():
    read, write = os.pipe()

    async def fork():
        if not (child := os.fork()):
            os.write(write, b"forked")
        return child

    child = result_of(fork())
    os.close(write)
    assert os.read(read, 9) == b"forked"
    assert os.read(read, 9) == b""  # its copy of the other end was closed
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_an_environment_of_coroutines_has_the_responses_and_scores_of_one_of_methods(
    make_run, tmp_path
):
    (tmp_path / "asking.py").write_text(ASYNC)
    score = ("reward.model=null", "reward.environment=letters")
    plain, _ = make_run(*ENVIRONMENT, STOPS, *score)
    found, _ = make_run(
        *ENVIRONMENT, STOPS, *score, "environment.factory=asking:made",
        f"environment.path={tmp_path}",
    )  # fmt: skip
    expected, rollout = respond(plain), respond(found)
    assert rollout.texts == expected.texts
    assert torch.equal(rollout.lengths, expected.lengths)
    scores = found.rewards(RewardInputs.of(rollout, 1)).total
    assert torch.equal(scores, plain.rewards(RewardInputs.of(expected, 1)).total)


def test_a_tool_can_be_a_coroutine_function(tmp_path):
    (tmp_path / "later.py").write_text(
        "import asyncio\n\n"
        "async def double(number: int):\n"
        '    """Doubles a number.\n\n    Args:\n        number: any.\n    """\n'
        "    await asyncio.sleep(0)\n"
        "    return 2 * number\n"
    )
    tools = Tools(EnvironmentConfig(tools=["later:double"], path=str(tmp_path)), None)
    answers = tools.answers([ToolCall(name="double", arguments={"number": 4})], None)
    assert [message["content"] for message in answers.messages] == ["8"]
