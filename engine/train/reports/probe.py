"""Runs a probe: the policy and the reference respond to an operator's prompt."""

from typing import Any

from engine.errors import CommandRejectedError, RewardError
from engine.train.data.prompts import Prompt
from engine.train.data.tokenise import tokenise_texts
from engine.train.distributed.ranks import PeerRankError
from engine.train.experience.scoring import scores_for_training
from engine.train.models.language_model import AnyModel
from engine.train.ppo import masked
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.rewards.source import RewardCallError, RewardInputs
from engine.train.rollout.backend import SamplingOptions, generate_responses
from engine.train.run import Run, max_sequence_tokens

PROBE_SEED = 0
"""The same for both models and all probes, so that only the models differ."""


def answer_probe(run: Run, text: str) -> dict[str, Any]:
    """Generates one response of each model, with its score and its KL to the reference.

    All ranks must call it. It has its own random stream, so a probe does not change the run. For a
    prompt of the run it uses the stored tokens, because tokenising the text of a rendered chat
    template again would add a second beginning-of-sequence token.

    Args:
        run: the run.
        text: the prompt.

    Returns:
        For each of `policy` and `reference`: `response`, `score`, `kl` (nats per response) and
        `length` (tokens).

    Raises:
        CommandRejectedError: the prompt has no tokens or too many, or the rewards cannot score it,
            for example because a reward function needs other columns of the data. Raised on all
            ranks.
    """
    prompt = run.prompts.find(text) or _tokenise(run, text)
    return {
        "policy": _probe_model(run, run.policy, prompt),
        "reference": _probe_model(run, run.reference, prompt),
    }


def _tokenise(run: Run, text: str) -> Prompt:
    (ids,) = tokenise_texts(run.tokenizer, [text])
    most, positions = run.config.data.max_prompt_tokens, max_sequence_tokens(run)
    if positions is not None:
        most = min(most, positions - run.config.rollout.max_new_tokens)
    if not 0 < len(ids) <= most:
        raise CommandRejectedError(f"a probe needs 1 to {most} tokens, not {len(ids)}")
    return Prompt(ids, text, {run.config.data.column: text})


def _probe_model(run: Run, model: AnyModel, prompt: Prompt) -> dict[str, Any]:
    config, state = run.config, run.state
    options = SamplingOptions(
        seed=PROBE_SEED,
        step=0,
        weights_version=state.step,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    rollout = generate_responses(run.backend, model, [prompt], options, run.tokenizer)
    try:
        raw, _ = run.rewards(RewardInputs.of(rollout, state.step), retry=False)
    except (RewardError, RewardCallError, PeerRankError) as error:
        raise CommandRejectedError(f"a probe cannot be scored: {error}") from error
    score = scores_for_training(run, raw, rollout, config.rollout.max_new_tokens)
    reference, _ = score_tokens(
        run.reference, rollout, config.rollout.temperature, MicroBatchLimit(1), want="logits"
    )
    return {
        "response": rollout.texts[0],
        "score": float(score[0]),
        "kl": float(masked.sequence_kl(rollout.logprobs, reference, rollout.mask)[0]),
        "length": int(rollout.lengths[0]),
    }
