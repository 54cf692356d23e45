"""A probe: what the policy of this moment, and its reference, answer to an operator's prompt."""

from typing import Any

from engine.errors import CommandRejectedError, RewardError
from engine.train.data.prompts import Prompt, tokenise_prompt
from engine.train.distributed.ranks import PeerRankError
from engine.train.models.language_model import AnyModel
from engine.train.ppo import masked
from engine.train.ppo.forward import score_tokens
from engine.train.rewards.normalise import Normaliser
from engine.train.rewards.source import FunctionError, RewardInputs
from engine.train.rollout.backend import SamplingOptions, generate_responses
from engine.train.run import Run

PROBE_SEED = 0
"""The same for both models and every probe: what differs is the models' doing."""


def answer_probe(run: Run, text: str) -> dict[str, Any]:
    """One answer of each model, with its score and its KL to the reference.

    Draws from a random stream of its own, so that a probed run stays the run it was. With one of
    the run's own prompts it reads the tokens that a step reads: tokenised again, what a chat
    template has rendered would begin twice.

    Raises:
        CommandRejectedError: the prompt holds no tokens, or too many; or a reward function cannot
            do without what the data has besides prompts. On all ranks alike.
    """
    prompt = run.prompts.find(text) or _typed(run, text)
    return {
        "policy": _answer(run, run.policy, prompt),
        "reference": _answer(run, run.reference, prompt),
    }


def _typed(run: Run, text: str) -> Prompt:
    ids = tokenise_prompt(run.tokenizer, text)
    if not 0 < len(ids) <= run.config.data.max_prompt_tokens:
        raise CommandRejectedError(
            f"a probe needs 1 to {run.config.data.max_prompt_tokens} tokens, this has {len(ids)}"
        )
    return Prompt(ids, text, {run.config.data.column: text})


def _answer(run: Run, model: AnyModel, prompt: Prompt) -> dict[str, Any]:
    config, state = run.config, run.state
    options = SamplingOptions(
        seed=PROBE_SEED,
        step=0,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    rollout = generate_responses(run.backend, model, [prompt], options, run.tokenizer)
    try:
        raw, _ = run.rewards(RewardInputs.of(rollout, state.step))
    except (RewardError, FunctionError, PeerRankError) as error:
        raise CommandRejectedError(f"a probe cannot be scored: {error}") from error
    normalise = Normaliser(state.reward_mean, state.reward_std)
    score = normalise(raw.to(run.device), config.reward, rollout.ended)
    reference, _ = score_tokens(
        run.reference, rollout, config.rollout.temperature, 1, want="logits"
    )
    return {
        "response": rollout.texts[0],
        "score": float(score[0]),
        "kl": float(masked.sequence_kl(rollout.logprobs, reference, rollout.mask)[0]),
        "length": int(rollout.lengths[0]),
    }
