"""Runs a probe: the policy and the reference respond to an operator's prompt."""

from typing import Any

import msgspec

from engine.errors import CommandRejectedError, RewardError
from engine.train.data.prompts import Prompt
from engine.train.data.tokenise import PromptTokenizer, tokenise_texts
from engine.train.experience.respond import respond
from engine.train.experience.scoring import scores_for_training
from engine.train.models.language_model import AnyModel
from engine.train.ppo import masked
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.rewards.source import RewardCallError, RewardInputs
from engine.train.rollout.backend import SamplingOptions
from engine.train.run import Run, max_sequence_tokens

PROBE_SEED = 0
"""The same for both models and all probes, so that only the models differ."""


def answer_probe(run: Run, text: str) -> dict[str, Any]:
    """Generates one response of each model, with its score and its KL to the reference.

    All ranks must call it. It has its own random stream, so a probe does not change the run.

    Args:
        run: the run.
        text: the prompt; see :func:`probed_prompt`.

    Returns:
        For each of `policy` and `reference`: `response`, `score`, `unscored` (why there is no
        score: a reward function may need other columns of the data), `kl` (nats per response),
        `length` (tokens), `replies` and `messages`, as a sample has them.

    Raises:
        CommandRejectedError: the prompt has no tokens or too many, or an environment fails. Raised
            on all ranks.
    """
    prompt = probed_prompt(run, text)
    return {
        "policy": _probe_model(run, run.policy, prompt),
        "reference": _probe_model(run, run.reference, prompt),
    }


def probed_prompt(run: Run, text: str) -> Prompt:
    """Returns what the models respond to.

    If the run's prompts are conversations, the text is a user message, unless it has special
    tokens: then it is a rendered conversation. A prompt of the run has its other columns.

    Raises:
        CommandRejectedError: it has no tokens or too many.
    """
    if (found := _known(run, text)) is not None:
        return found
    data, column = run.config.data, {run.config.data.column: text}
    rendered = any(token in text for token in run.tokenizer.all_special_tokens)
    if run.prompts.for_step(1)[0].messages is not None and not rendered:
        as_chat = PromptTokenizer(msgspec.structs.replace(data, chat=True), run.tokenizer, "probe")
        (row,) = as_chat.encode([text], 0).to_pylist()
        if (found := _known(run, row["text"])) is not None:
            return found
        prompt = Prompt(row["ids"] or [], row["text"], column, row["messages"])
    else:
        prompt = Prompt(tokenise_texts(run.tokenizer, [text])[0], text, column)
    most, positions = data.max_prompt_tokens, max_sequence_tokens(run)
    if positions is not None:
        after = run.config.rollout.max_new_tokens + run.config.reply_tokens
        most = min(most, positions - after)
    if not 0 < len(prompt.ids) <= most:
        raise CommandRejectedError(f"a probe needs 1 to {most} tokens, not {len(prompt.ids)}")
    return prompt


def _known(run: Run, text: str) -> Prompt | None:
    """The prompt of the run with this text, also of those that are held out."""
    held_out = run.held_out.prompts if run.held_out is not None else []
    return run.prompts.find(text) or next((p for p in held_out if p.text == text), None)


def _probe_model(run: Run, model: AnyModel, prompt: Prompt) -> dict[str, Any]:
    config, state = run.config, run.state
    options = SamplingOptions(
        seed=PROBE_SEED,
        step=0,
        weights_version=state.step,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    try:
        rollout = respond(run, model, [prompt], options, purpose="a probe")
    except RewardCallError as error:
        raise CommandRejectedError(f"a probe cannot be answered: {error}") from error
    score, unscored = None, ""
    try:
        raw = run.rewards(RewardInputs.of(rollout, state.step), retry=False)
    except (RewardError, RewardCallError) as error:
        unscored = str(error)
    else:
        most = config.rollout.max_new_tokens
        score = float(scores_for_training(run, raw.total, rollout, most)[0])
    reference, _ = score_tokens(
        run.reference, rollout, config.rollout.temperature, MicroBatchLimit(1), want="logits"
    )
    return {
        "response": rollout.texts[0],
        "score": score,
        "unscored": unscored,
        "kl": float(masked.sequence_kl(rollout.logprobs, reference, rollout.mask)[0]),
        "length": int(rollout.lengths[0]),
        "replies": rollout.replies(0),
        "messages": msgspec.to_builtins(rollout.messages(0)),
    }
