"""The policy calls tools in its turns."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from engine import starter
from engine.config import file as config_file
from engine.config.sections.environment import EnvironmentConfig
from engine.errors import UserInputError
from engine.train.environment.environments import Environments
from engine.train.environment.tool_calls import ToolCall
from engine.train.environment.tools import Tools
from engine.train.evaluation.evaluate import evaluate
from engine.train.experience.generation import generate_rollout
from engine.train.ppo.metrics import conversation_metrics
from engine.train.reports.probe import answer_probe
from engine.train.rollout.rollout import replace_rows
from engine.train.step import train_step
from tests.train.arithmetic import CHAT, CHATTING, FOLDER, Game


def tools(*names, factory=None, **keys):
    return Tools(EnvironmentConfig(tools=list(names), path=FOLDER, **keys), factory)


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def results(found, text, environment=None):
    return [m["content"] for m in found.answers(found.calls(text), environment).messages]


def test_the_calls_of_a_turn_are_run_in_their_order():
    found = tools("arithmetic:add")
    text = f"Let me see. {call('add', a=1, b=2)}{call('add', a=3, b=4)}"
    answers = found.answers(found.calls(text), None)
    assert answers.messages == [
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "tool", "name": "add", "content": "7"},
    ]
    assert not answers.problems
    assert found.calls("I am done: 7") == []


def test_the_schema_says_what_a_tool_takes():
    (schema,) = tools("arithmetic:add").schemas
    described = schema["function"]
    assert (described["name"], described["description"]) == ("add", "Adds two numbers.")
    assert described["parameters"]["properties"]["a"] == {
        "type": "integer", "description": "The first number.",
    }  # fmt: skip


def test_a_method_of_the_environment_is_called_on_that_of_the_response():
    found, one, other = tools("look", factory=Game), Game(), Game()
    assert results(found, call("look") + call("look"), one) == [
        "you have looked 1 times", "you have looked 2 times",
    ]  # fmt: skip
    assert results(found, call("look"), other) == ["you have looked 1 times"]


def test_the_tool_of_the_example_says_what_it_takes_and_computes():
    path = str(Path(__file__).parents[2] / "examples")
    found = Tools(EnvironmentConfig(tools=["calculator:calculate"], path=path), None)
    (schema,) = found.schemas
    assert schema["function"]["parameters"]["required"] == ["formula"]
    text = call("calculate", formula="(12 + 3) * 7") + call("calculate", formula="os.getcwd()")
    right, wrong = results(found, text)
    assert right == "105"
    assert wrong.startswith("error: ValueError: not arithmetic")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<tool_call>add(1, 2)</tool_call>", "error: the call is not JSON"),
        ("<tool_call>[1]</tool_call>", "error: the call is no object with a name"),
        ('<tool_call>{"name": 3}</tool_call>', "error: the call is no object with a name"),
        ('<tool_call>{"name": "add", "arguments": 3}</tool_call>', "the arguments are no object"),
        (call("subtract", a=1), "error: there is no tool 'subtract'; the tools are add"),
        (call("add", a=1), "error: TypeError: "),
        (call("add", a=1, b="x"), "error: TypeError: "),
    ],
)
def test_what_is_wrong_with_a_call_is_told_to_the_policy(text, says):
    found = tools("arithmetic:add")
    answers = found.answers(found.calls(text), None)
    assert says in answers.messages[0]["content"]
    (problem,) = answers.problems
    assert not problem.startswith(":")


@pytest.mark.parametrize("half", ["name", "argument", "result"])
def test_half_a_character_in_a_call_or_a_result_does_not_end_the_rank(half, tmp_path):
    (tmp_path / "halves.py").write_text(
        'def echo(code: int) -> str:\n    """Echoes.\n\n    Args:\n        code: It.\n    """\n'
        "    return chr(code)\n"
    )
    found = Tools(EnvironmentConfig(tools=["halves:echo"], path=str(tmp_path)), None)
    text = {
        "name": r'{"name": "\ud83d"}',
        "argument": r'{"name": "echo", "arguments": {"\ud83d": 1}}',
        "result": r'{"name": "echo", "arguments": {"code": 55357}}',
    }[half]
    answers = found.answers(found.calls(f"<tool_call>{text}</tool_call>"), None)
    sent = msgspec.msgpack.encode([answers.messages, answers.problems])
    assert b"ud83d" in sent


def test_calls_are_also_read_in_the_notation_of_functions_and_parameters():
    found = tools("arithmetic:add")
    written = "<function=add>\n{}\n</function>"
    given = "<parameter=a>\n1\n</parameter>\n<parameter=b>\n20\n</parameter>"
    assert results(found, f"<tool_call>\n{written.format(given)}\n</tool_call>") == ["21"]
    said = "<function=say><parameter=text>\n1\n\n2\n</parameter></function>"
    (one,) = found.calls(f"<tool_call>{said}</tool_call>")
    assert one.arguments == {"text": "1\n\n2"}


def test_a_call_that_is_only_thought_of_is_not_run():
    found = tools("arithmetic:add")
    thought = f"<think>I could {call('add', a=1, b=1)}</think>"
    assert found.calls(f"{thought}Done.") == []
    assert results(found, f"{thought}{call('add', a=2, b=2)}") == ["4"]
    assert found.calls(f"Hm. <think>{call('add', a=1, b=1)}") == []


@pytest.mark.parametrize("text", ["<tool_call>" + "\n" * 100_000, "<tool_call>" * 100_000])
def test_a_call_that_is_never_closed_does_not_occupy_the_rank(text):
    """A regular expression would look for its end for years."""
    assert tools("arithmetic:add").calls(text) == []


def test_what_tools_answer_can_be_sent_to_the_other_ranks():
    class Text(str):
        pass

    found = tools("arithmetic:echo")
    for said in (Text("a"), "\ud83d"):
        answers = found.answers([ToolCall("echo", {"text": said})], None)
        assert msgspec.msgpack.encode(answers.messages)
    unknown = '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'
    (message,) = found.answers(found.calls(unknown), None).messages
    assert message["name"] == r"\ud83d"
    assert msgspec.msgpack.encode(message)


def test_results_that_are_no_text_are_written_as_json_in_the_letters_of_their_language():
    found = tools("arithmetic:collect")
    assert results(found, call("collect", item="é漢")) == ['["é漢"]']


def test_a_tool_that_exits_tells_the_policy_and_does_not_end_the_run():
    found = tools("arithmetic:leave")
    assert results(found, call("leave")) == ["error: SystemExit: 3"]


def test_parameters_are_another_word_for_arguments():
    found = tools("arithmetic:add", call_pattern=r"^(\{.*\})$")
    assert results(found, '{"name": "add", "parameters": {"a": 1, "b": 1}}') == ["2"]


@pytest.mark.parametrize(
    ("names", "factory", "says"),
    [
        (["arithmetic:untyped"], None, "a tool needs type hints"),
        (["arithmetic:nothing"], None, "has no function 'nothing'"),
        (["arithmetic:add", "arithmetic:add"], None, "another tool with the name add"),
        (["listen"], Game, "has no method listen"),
    ],
)
def test_a_tool_that_cannot_be_described_is_refused(names, factory, says):
    with pytest.raises(UserInputError, match=says) as raised:
        tools(*names, factory=factory)
    assert f"environment.tools[{len(names) - 1}]" in str(raised.value)


def test_the_policy_is_told_about_tools_and_gets_their_results(make_run):
    run, _ = make_run(*CHATTING)
    assert run.prompts.for_step(1)[0].text.startswith("<tools>add<")
    rollout = generate_rollout(run, 1)
    assert max(turns.count for turns in rollout.conversation.turns) > 1
    for text, turns in zip(rollout.texts, rollout.conversation.turns, strict=True):
        for start, end in turns.replies:
            assert text[start:end].startswith("<end><tool>error: the call is not JSON")
    metrics, _ = train_step(run, 2)
    assert metrics["environment/tool_calls"] >= 1
    assert metrics["environment/failed_calls"] == 1


def test_the_log_says_which_responses_had_calls_that_failed(make_run, caplog):
    run, _ = make_run(*CHATTING, "eval={every: 1, holdout: 4}")
    generate_rollout(run, 2)
    evaluate(run, run.held_out, 2)
    answer_probe(run, run.prompts.for_step(1)[0].text)
    told = [r.getMessage() for r in caplog.records if "failed; the first" in r.getMessage()]
    purposes = ["step 2", "the evaluation after step 2", "a probe", "a probe"]
    assert len(told) == len(purposes)
    for text, purpose in zip(told, purposes, strict=True):
        assert f" tool calls of {purpose} failed; the first: the call is not JSON" in text


def test_the_calls_of_responses_that_were_replaced_do_not_count(make_run):
    run, _ = make_run(*CHATTING)
    first, other = (generate_rollout(run, n, lambda _done, _total: None) for n in (1, 2))
    mixed = replace_rows(first, torch.tensor([0, 3]), other, torch.tensor([2, 1]))
    metrics = conversation_metrics(mixed.conversation, mixed)
    assert metrics["environment/tool_calls"] == metrics["environment/turns"]  # each turn is a call
    assert (
        metrics["environment/turns"]
        != conversation_metrics(first.conversation, first)["environment/turns"]
    )


def test_the_same_environment_has_tools_and_scores(make_run):
    run, _ = make_run(
        *CHATTING, "environment.factory=arithmetic:Game", "environment.tools=['look']",
        "reward.model=null", "reward.environment=solved",
    )  # fmt: skip
    train_step(run, 1)


def test_an_environment_can_give_scores_to_the_turns_that_call_tools(make_run):
    run, _ = make_run(
        *CHATTING, "environment.factory=arithmetic:Tally", "environment.tools=['look']",
        "reward.model=null", "reward.environment=by_turn",
    )  # fmt: skip
    rollout = generate_rollout(run, 1)
    scores = [turns.environment.by_turn() for turns in rollout.conversation.turns]
    turns = [turns.count for turns in rollout.conversation.turns]
    assert max(turns) > 1
    assert scores == [[1.0] * count for count in turns]
    train_step(run, 2)


def test_tools_need_conversations_and_a_template_that_tells_about_them(make_run):
    with pytest.raises(UserInputError, match=r"set data\.chat: true"):
        make_run(*CHATTING, "data.chat_template=null", "data.chat=false")
    silent = CHAT.replace("{% if tools %}<tools>{{ tools[0].function.name }}{% endif %}", "")
    with pytest.raises(UserInputError, match="says nothing about tools"):
        make_run(*CHATTING, f"data.chat_template='{silent}'")


def test_a_template_that_drops_results_is_refused(make_run):
    forgetful = CHAT.replace("in messages %}", "in messages if m.role != 'tool' %}")
    with pytest.raises(UserInputError, match="does not show messages of the role tool"):
        make_run(*CHATTING, f'data.chat_template="{forgetful}"')


def test_other_ranks_need_no_modules():
    class OtherRank:
        is_lead = False

        def broadcast_bytes(self, data):
            assert data == b"[]"
            return b'[{"type": "function"}]'

    overrides = ["environment.tools=['nowhere:at_all']"]
    other = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    assert Environments(other, OtherRank()).tool_schemas() == [{"type": "function"}]
