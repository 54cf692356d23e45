"""Checks that what was loaded fits together, and is what the run began with."""

import logging
from collections.abc import Callable

import torch

from engine.config.schema import RunConfig
from engine.config.sections.reward import RewardConfig
from engine.errors import CheckpointError, UserInputError
from engine.protocol.rank_messages import Placed
from engine.train.checkpoints.folder import FrozenModels, TrainingState
from engine.train.data.chat_template import render_chat
from engine.train.environment.reply_tokens import ReplyTokens
from engine.train.models.language_model import (
    AdapterFreePolicy,
    AnyModel,
    LanguageModel,
    fingerprint,
)
from engine.train.models.router_loss import has_router_loss, has_routers
from engine.train.run import Run, max_sequence_tokens

log = logging.getLogger("engine")


def check_rank_count(config: RunConfig, ranks: int) -> None:
    """Checks that every rank has work; the number of ranks is only known at run time.

    Raises:
        UserInputError: there are too few prompts or samples; names the key to change.
    """
    reward, prompts = config.reward, config.prompts_per_step
    if prompts < ranks:
        raise UserInputError(
            f"{ranks} ranks need at least {ranks} prompts per step, and there are {prompts}: raise "
            "rollout.batch_size, or set launch.processes"
        )
    if _normalises(reward) and reward.normalise_samples < ranks:
        raise UserInputError(
            f"reward.normalise_samples ({reward.normalise_samples}) must be at least the number of "
            f"ranks ({ranks})"
        )


def check_device(placed: Placed | None, device: torch.device) -> None:
    """Checks that a run that computed on a GPU does not go on on the CPU without being told to.

    That would happen with `launch.device: auto` if the GPU has failed, or its driver was updated
    while the machine was running.

    Args:
        placed: how the attempt before was placed.
        device: what torch found for this one.

    Raises:
        UserInputError: torch finds no GPU any more.
    """
    if placed is not None and placed.device.startswith("cuda") and device.type == "cpu":
        raise UserInputError(
            "the run computed on a GPU before, and torch finds none here now: see rlhf-tui doctor, "
            "or resume with -o launch.device=cpu"
        )


def _normalises(reward: RewardConfig) -> bool:
    """Whether the reference's responses must be scored before the first step."""
    return "reference" in (reward.normalise, *(s.normalise for s in reward.sources()))


def has_other_reference(state: TrainingState, config: RunConfig) -> bool:
    """Whether a fork has given the run another reference than the checkpoint's."""
    before, now = state.frozen, FrozenModels.of(config.model)
    return before is not None and before.reference != now.reference


def check_frozen_models(
    state: TrainingState,
    config: RunConfig,
    policy: LanguageModel,
    reference: AnyModel,
    threads: int,
    changed: Callable[[str], None],
) -> None:
    """Checks that the frozen models, which no checkpoint holds, are those the run began with.

    A fork may name another reference, or hold them in another dtype. Stores their fingerprints and
    the number of threads in `state`.

    Args:
        state: of the run.
        config: of the run.
        policy: with its adapters, if any.
        reference: loaded.
        threads: of this rank.
        changed: called with a sentence if the KL is measured against another reference.

    Raises:
        CheckpointError: the weights of a frozen model have changed.
    """
    weights, frozen = fingerprint(reference), FrozenModels.of(config.model)
    before = state.frozen or frozen
    if state.reference and state.reference != weights:
        if before == frozen:
            raise CheckpointError(
                "the reference model is not the one this run began with: "
                f"{config.model.reference or config.model.policy} was changed; put it back to "
                "resume"
            )
        if before.reference != frozen.reference:
            text = (
                f"from step {state.step + 1} on the KL is measured against {frozen.reference}, "
                f"before against {before.reference}: kl.beta may need another value"
            )
            log.info(text)
            changed(text)
    base = ""  # without adapters
    if config.lora.rank is not None:
        base = (
            weights
            if isinstance(reference, AdapterFreePolicy)
            else fingerprint(AdapterFreePolicy(policy))
        )
    only_dtype = before.policy == frozen.policy and before.dtype != frozen.dtype
    if state.base and state.base != base and not only_dtype:
        raise CheckpointError(
            "the model under the adapters is not the one this run began with: "
            f"{config.model.policy} was changed; put it back to resume"
        )
    if state.threads not in (0, threads):
        log.warning(
            "%d threads instead of %d: results will differ by rounding", threads, state.threads
        )
    state.reference, state.base, state.threads = weights, base, threads
    state.frozen = frozen


def check_response_length(run: Run) -> None:
    """Checks that the longest prompt leaves room for a response. Raises UserInputError."""
    positions, configured = max_sequence_tokens(run), run.config.rollout.max_new_tokens
    if positions is None:
        return
    replies = run.config.reply_tokens
    limit = positions - run.prompts.longest - replies
    with_replies = f" with environment.max_tokens ({replies})" if replies else ""
    and_replies = f" and environment.max_tokens ({replies})" if replies else ""
    lower = "environment.max_tokens, or " if replies else ""
    if limit < 1:
        raise UserInputError(
            f"the longest prompt has {run.prompts.longest} tokens and the models {positions} "
            f"positions, which leaves none for a response{with_replies}: lower {lower}"
            "data.max_prompt_tokens to leave long prompts out"
        )
    if configured > limit:
        raise UserInputError(
            f"rollout.max_new_tokens ({configured}) must be at most {limit}: the models have "
            f"no more positions after the longest prompt ({run.prompts.longest} tokens)"
            f"{and_replies}; for more, lower {lower}data.max_prompt_tokens to leave out long "
            "prompts"
        )
    if run.held_out is None:
        return
    wanted = run.config.eval.max_new_tokens or configured
    longest = max(len(p.ids) for p in run.held_out.prompts)
    if longest + replies + wanted > positions:
        raise UserInputError(
            f"eval.max_new_tokens ({wanted}) is too large: the models have {positions} "
            f"positions, and the longest prompt to evaluate{with_replies} takes {longest + replies}"
        )


def check_replies(run: Run) -> None:
    """Checks that the chat template renders replies and tools. Raises UserInputError."""
    if run.environments is None:
        return
    environment, prompt = run.config.environment, run.prompts.for_step(1)[0]
    if environment.tools:
        if prompt.messages is None:
            raise UserInputError(
                "environment.tools needs conversations, whose template tells the policy about "
                "them: set data.chat: true"
            )
        without = (run.config.data.template_arguments or {}) | {"tools": None}
        text = render_chat(
            run.tokenizer, prompt.messages, "data", add_generation_prompt=True, **without
        )
        if text == prompt.text:
            raise UserInputError(
                "environment.tools: the chat template says nothing about tools; use a model that "
                "was trained to call them, or give data.chat_template"
            )
    if prompt.messages is None:  # text, which a reply continues as it is
        return
    for role in {"tool"} if environment.tools else {environment.role}:
        reply = [{"role": role, "name": "tool", "content": "A reply"}]
        tokens = ReplyTokens(run.config, run.tokenizer)(prompt, reply, last=-1)
        if reply[0]["content"] not in run.tokenizer.decode(tokens):
            raise UserInputError(
                f"environment: the chat template does not show messages of the role {role}; use "
                "environment.role: user without tools, another model, or data.chat_template"
            )


def check_routers(config: RunConfig, policy: LanguageModel) -> None:
    """Checks that the policy has a load-balancing loss if it is to be trained with one.

    Raises:
        UserInputError: it has none.
    """
    if not config.ppo.router_coef:
        return
    name = type(policy.lm).__name__.removeprefix("FSDP")
    if not has_router_loss(policy.lm):
        raise UserInputError(
            f"ppo.router_coef: transformers has no load-balancing loss of routers for {name}: "
            "leave it out"
        )
    if not has_routers(policy.lm):
        raise UserInputError(
            f"ppo.router_coef: {config.model.policy} has no experts, although other models of its "
            f"class {name} do: leave it out"
        )


def check_vocabularies(policy: int, reference: int) -> None:
    """Checks that both models have as many tokens. Raises UserInputError."""
    if policy != reference:
        raise UserInputError(
            f"model.reference has a vocabulary of {reference} tokens and model.policy one of "
            f"{policy}: the KL needs the same tokens in both"
        )
