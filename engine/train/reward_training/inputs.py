"""The responses of a request as a reward model reads them in a run."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from engine import starter
from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.protocol.programs.reward_training import JudgedText, RewardTrainingRequest
from engine.protocol.rank_messages import SampleMessages
from engine.train.data.load_prompts import load_prompts
from engine.train.data.prompts import Messages, Prompt
from engine.train.data.tokenise import tokenise_texts
from engine.train.distributed.ranks import RankGroup
from engine.train.environment.reply_tokens import ReplyTokens
from engine.train.models.pretrained import load_policy_tokenizer


@dataclass(frozen=True)
class JudgedInputs:
    """Prompts and responses in the policy's tokens, in the order of the request."""

    prompts: list[Prompt]
    ids: list[list[int]]
    texts: list[str]
    messages: list[Messages]
    """The responses as chat messages."""
    vocabularies: list[dict[str, int]]
    """The vocabulary of each session's policy: token ids by token."""
    notes: list[str]


def judged_inputs(request: RewardTrainingRequest, ranks: RankGroup) -> JudgedInputs:
    """Tokenises the responses with the tokenizers of their policies.

    A judgement only stores text. Tokenising it again gives the sampled tokens, except where the
    policy spelled a word with other tokens than the tokenizer would. Conversations with an
    environment are rendered by the chat template again.

    Raises:
        UserInputError: a tokenizer cannot be loaded.
    """
    tokenizers = [
        load_policy_tokenizer(config, starter.resolve(config.model.policy), ranks)
        for config in request.configs
    ]
    known, notes = [], []
    for number, tokenizer in enumerate(tokenizers):
        found, of_session = _session_prompts(request, number, tokenizer)
        known.append(found)
        notes += [f"session '{request.sessions[number]}': {note}" for note in of_session]
    read = [
        _tokenised(r, request.configs[r.session], tokenizers[r.session], known[r.session])
        for r in request.responses
    ]
    return JudgedInputs(
        prompts=[prompt for prompt, _ in read],
        ids=[ids for _, ids in read],
        texts=[r.response for r in request.responses],
        messages=[
            [{"role": "assistant", "content": r.response}]
            if r.messages is None
            else r.messages.response
            for r in request.responses
        ],
        vocabularies=[tokenizer.get_vocab() for tokenizer in tokenizers],
        notes=notes,
    )


def _session_prompts(
    request: RewardTrainingRequest, number: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Prompt], list[str]]:
    """The prompts of a session's responses without messages, by text; and notes on them."""
    config = request.configs[number]
    texts = [r.prompt for r in request.responses if r.session == number and r.messages is None]
    found, note = _find_prompts(config, tokenizer, set(texts))
    notes = [note] if note else []
    if config.environment.replies and any(p.messages is not None for p in found.values()):
        notes.append(
            f"the turns of {len(texts)} responses are read without the chat template's markup "
            "between them, which is not recorded"
        )
    return found, notes


def _tokenised(
    response: JudgedText,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    known: dict[str, Prompt],
) -> tuple[Prompt, list[int]]:
    """A response's prompt, and its own token ids."""
    text = response.prompt
    if response.messages is not None:
        rendered = tokenise_texts(tokenizer, [text], special=False)[0]
        prompt = Prompt(rendered, text, {}, response.messages.prompt)
        ids = _conversation_ids(prompt, response.messages, config, tokenizer)
    else:
        prompt = known.get(text) or Prompt(tokenise_texts(tokenizer, [text])[0], text, {})
        ids = list(tokenizer(response.response, add_special_tokens=False)["input_ids"])
    return prompt, ids + _end_of(response, config, tokenizer)


def _find_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, wanted: set[str]
) -> tuple[dict[str, Prompt], str]:
    """The prompts of the data set with these texts, which know whether they are conversations.

    Returns:
        By text; and why some are taken as plain text, or "".
    """
    if not wanted:
        return {}, ""
    try:
        prompts = load_prompts(config.data, tokenizer, per_step=1, seed=config.seed)
    except UserInputError as error:
        return (
            {},
            f"its prompts are taken as plain text, because their data cannot be read: {error}",
        )
    found = {text: prompt for text in wanted if (prompt := prompts.find(text)) is not None}
    if missing := len(wanted) - len(found):
        text = f"{missing} of {len(wanted)} prompts are not in its data"
        return found, f"{text} and are taken as plain text"
    return found, ""


def _conversation_ids(
    prompt: Prompt, messages: SampleMessages, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """What follows the prompt of a conversation with an environment, as in a run."""
    encode_reply = ReplyTokens(config, tokenizer)
    ids: list[int] = []
    of_policy = itertools.groupby(messages.response, lambda m: m["role"] == "assistant")
    for is_turn, group in of_policy:
        if is_turn:
            text = "".join(message["content"] for message in group)
            ids += tokenise_texts(tokenizer, [text], special=False)[0]
        else:
            ids += encode_reply(prompt, list(group), last=-1)
    return ids


def _end_of(
    response: JudgedText, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The end-of-sequence token, if the response ended with it and not at a stop string."""
    messages = response.messages
    last_turn = response.response if messages is None else messages.response[-1]["content"]
    # The token that completes a stop string may go on after it.
    stopped = any(text in last_turn for text in config.rollout.stop)
    ended = response.ended and not stopped and tokenizer.eos_token_id is not None
    return [tokenizer.eos_token_id] if ended else []


def check_same_tokens(
    request: RewardTrainingRequest,
    vocabularies: Sequence[dict[str, int]],
    own: dict[str, int],
    *,
    pair: bool,
) -> None:
    """Checks that the model reads the responses of all sessions in the same way.

    A model with a policy's vocabulary reads that policy's tokens; any other model reads text. After
    training on both, it would only be used on one of them.

    Raises:
        UserInputError: it has the vocabulary of some of the policies, but not all.
    """
    same = [not pair and own == vocabulary for vocabulary in vocabularies]
    if any(same) and not all(same):
        one, other = request.sessions[same.index(True)], request.sessions[same.index(False)]
        raise UserInputError(
            f"the policies of sessions '{one}' and '{other}' have different tokenizers, and the "
            "reward model reads the tokens of the first only: train on sessions of one tokenizer, "
            "or start from a model with a tokenizer of its own (--base)"
        )
