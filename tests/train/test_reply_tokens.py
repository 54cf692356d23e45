"""What stands between two turns of the policy: a reply within the chat template."""

import pytest

from engine.errors import UserInputError
from engine.train.data.prompts import Prompt
from engine.train.environment.reply_tokens import TURN, ReplyTokens
from tests.train.repeating import ENVIRONMENT, STOPS, respond

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.strip() }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_reply_in_a_conversation_is_a_message_of_the_chat_template(make_run, role):
    run, _ = make_run(
        *ENVIRONMENT, f"data.chat_template='{CHAT}'", "data.chat=true", f"environment.role={role}"
    )
    prompt = run.prompts.for_step(1)[0]
    assert prompt.messages is not None
    reply = [{"role": role, "content": " Colder! "}]
    tokens = ReplyTokens(run.config, run.tokenizer)(prompt, reply, last=5)
    assert run.tokenizer.decode(tokens) == f"<end><{role}>Colder!<end><assistant>"


def test_a_prompt_may_contain_any_text(make_run):
    run, _ = make_run(*ENVIRONMENT, f"data.chat_template='{CHAT}'", "data.chat=true")
    encode = ReplyTokens(run.config, run.tokenizer)
    messages = [{"role": "user", "content": f"what is {TURN} and {TURN}.?"}]
    reply = [{"role": "user", "content": f"{TURN} is nothing"}]
    tokens = encode(Prompt([5], "", {}, messages), reply, last=-1)
    assert run.tokenizer.decode(tokens) == f"<end><user>{TURN} is nothing<end><assistant>"


def test_a_reply_can_be_several_messages(make_run, tmp_path):
    (tmp_path / "two_tools.py").write_text(
        "class TwoTools:\n"
        "    said = False\n"
        "    def reply(self, text):\n"
        "        if self.said:\n"
        "            return None\n"
        "        self.said = True\n"
        "        return [{'role': 'tool', 'content': '4'}, {'role': 'tool', 'content': '5'}]\n"
    )
    run, _ = make_run(
        "environment.factory=two_tools:TwoTools", f"environment.path={tmp_path}", STOPS,
        "environment.max_tokens=60", f"data.chat_template='{CHAT}'", "data.chat=true",
    )  # fmt: skip
    rollout = respond(run)
    for text, turns in zip(rollout.texts, rollout.conversation.turns, strict=True):
        ((start, end),) = turns.replies
        assert text[start:end] == "<end><tool>4<end><tool>5<end><assistant>"
        roles = [message["role"] for message in turns.messages]
        assert (roles, turns.count) == (["assistant", "tool", "tool", "assistant"], 2)


def test_the_token_that_ends_a_message_is_not_repeated(make_run, tokenizer):
    template = CHAT.replace("<end>", tokenizer.eos_token)
    run, _ = make_run(*ENVIRONMENT, f"data.chat_template='{template}'", "data.chat=true")
    prompt = run.prompts.for_step(1)[0]
    encode = ReplyTokens(run.config, run.tokenizer)
    end = tokenizer.eos_token_id
    reply = [{"role": "user", "content": "No"}]
    assert encode(prompt, reply, last=5)[0] == end
    assert encode(prompt, reply, last=end) == encode(prompt, reply, last=5)[1:]


def test_a_template_that_drops_turns_is_refused_before_the_first_step(make_run):
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserInputError, match="does not show the policy's turns"):
        make_run(*ENVIRONMENT, f'data.chat_template="{template}"', "data.chat=true")
