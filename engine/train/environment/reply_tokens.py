"""The tokens between two turns of the policy: an environment's reply and the template around it."""

from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.train.data.chat_template import render_chat
from engine.train.data.prompts import Messages, Prompt
from engine.train.data.tokenise import tokenise_texts

TURN = "rlhf-tui:turn"
"""Stands for the policy's turn in a rendered conversation, of which only what follows is used."""


class ReplyTokens:
    """Turns replies into tokens that continue a response."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template_arguments = config.data.template_arguments or {}
        self._tokenizer = tokenizer

    def __call__(self, prompt: Prompt, reply: Messages, last: int) -> list[int]:
        """Returns the tokens from the end of the policy's turn to the beginning of its next one.

        Plain text is continued by the text of the reply. A conversation is continued as its chat
        template does it: the end of the policy's message, the messages of the reply, and the
        beginning of the policy's next message.

        Args:
            prompt: what the response began with.
            reply: the environment's messages.
            last: the last token that the policy sampled. If it is the one that ends a message, it
                is not repeated.

        Raises:
            UserInputError: the template cannot render such a conversation.
        """
        if prompt.messages is None:
            text = "".join(message["content"] for message in reply)
            return tokenise_texts(self._tokenizer, [text], special=False)[0]
        turn = TURN
        while any(turn in message["content"] for message in (*prompt.messages, *reply)):
            turn += "."
        messages = [*prompt.messages, {"role": "assistant", "content": turn}, *reply]
        text = render_chat(
            self._tokenizer, messages, "environment.role", add_generation_prompt=True,
            **self._template_arguments,
        )  # fmt: skip
        _, found, after = text.partition(turn)
        if not found:
            raise UserInputError(
                "environment: the chat template does not show the policy's turns that are followed "
                "by a reply; use another model, or give data.chat_template"
            )
        ids = tokenise_texts(self._tokenizer, [after], special=False)[0]
        return ids[1:] if ids[:1] == [last] else ids
