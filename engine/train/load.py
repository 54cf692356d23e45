"""Loads a run, from its configuration or from a checkpoint."""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from transformers import PreTrainedTokenizerBase

from engine import starter
from engine.config.schema import RunConfig
from engine.config.settings import change_settings
from engine.progress import Announce, BeginPart, announce_nothing, report_nothing
from engine.protocol.rank_messages import REWARD_CHANGED, Begin
from engine.session.checkpoints import AVERAGED_POLICY, POLICY, checkpoint_path
from engine.session.folder import SessionFolder
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints.folder import SavedState, TrainingState
from engine.train.checkpoints.shards import (
    has_average,
    load_average,
    load_reference_weights,
    load_training,
)
from engine.train.data.prompt_order import Prompts
from engine.train.data.prompts import Prompt
from engine.train.data.randomness import derived_seed
from engine.train.distributed.ranks import RankGroup, set_threads_and_nice
from engine.train.distributed.sharding import learner
from engine.train.distributed.share_prompts import load_on_all_ranks
from engine.train.environment.environments import Environments
from engine.train.evaluation.held_out import HeldOut, split_prompts
from engine.train.load_checks import (
    check_device,
    check_frozen_models,
    check_rank_count,
    check_replies,
    check_response_length,
    check_routers,
    check_vocabularies,
    has_other_reference,
)
from engine.train.models.language_model import AnyModel, LanguageModel
from engine.train.models.memory_check import check_memory
from engine.train.models.pretrained import (
    eos_ids,
    load_policy,
    load_policy_tokenizer,
    load_reference,
)
from engine.train.models.reference_update import check_same_shapes
from engine.train.policy_average import PolicyAverage
from engine.train.ppo.adamw import make_optimiser
from engine.train.reward_scales import use_saved_scales
from engine.train.rewards.mix import RewardMix, load_rewards
from engine.train.rewards.source import LoadContext
from engine.train.rewards.value_init import load_value_model
from engine.train.rollout.ahead import rollout_ahead
from engine.train.rollout.backend import BACKENDS, RolloutBackend
from engine.train.rollout.context import BackendContext
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.run import Run

log = logging.getLogger("engine")

STAGES = ("prompts", "reward", "policy", "reference")
"""The stages of loading, in order."""
OTHER_OPTIMISER = (
    "train.optimiser is {}, and the checkpoint has the state of another optimiser: the moments "
    "start from zero"
)


def load_run(
    session: SessionFolder,
    config: RunConfig,
    begin: Begin,
    ranks: RankGroup,
    announce: Announce = announce_nothing,
    notify: Callable[[str, str], None] = lambda _rule, _text: None,
) -> Run:
    """Loads everything that a step needs; all ranks must call it.

    Rank 0 reads the files and sends their content to the other ranks. The exception is the weights
    of sharded models: each rank reads its own shards. Prompts are loaded before weights, so that a
    mistake in the data shows up before minutes of loading.

    Args:
        session: the session's folder.
        config: the configuration that the run was started with; live settings are restored from the
            checkpoint.
        begin: the step to start from, and the setting changes to repeat.
        ranks: all ranks of this attempt.
        announce: called with each phase of loading.
        notify: called with the rule and the text of each notice to the operator: `memory` if the
            models probably do not fit, `settings` if a saved setting is ignored, `reference` or
            `reward_changed` if that differs from the one used before the checkpoint.

    Raises:
        UserInputError: something that the configuration names cannot be used.
        CheckpointError: the checkpoint to start from cannot be used.
    """
    stages = itertools.count()

    def begin_stage(name: str) -> None:
        log.info("load %s", name)
        announce(begin.from_step, f"load {name}", next(stages), len(STAGES))

    # 1. The ranks, and what they start from.
    check_rank_count(config, ranks.size)
    if config.launch.device == "auto":
        check_device(begin.placed, ranks.device)
    threads = set_threads_and_nice(ranks, config.launch)
    start = _starting_point(session, config, begin, ranks, partial(notify, "settings"))
    state = start.state

    # 2. The prompts, and whether the models fit into memory with them.
    begin_stage("prompts")
    tokenizer = _load_tokenizer(start, ranks)
    config, environments = _load_environments(start.config, ranks)
    prompts, held_out_prompts = _load_prompts(
        config, tokenizer, ranks, lambda part: announce(begin.from_step, f"load prompts: {part}")
    )
    strategy, models, memory = check_memory(
        first_step_config(config, begin), prompts.longest, ranks, partial(notify, "memory"),
        begin.placed,
    )  # fmt: skip

    # 3. The reward sources.
    begin_stage("reward")
    context = LoadContext(
        config.reward, tokenizer.get_vocab(), ranks, strategy,
        on_host=config.parallel.frozen == "offload",
        environment=None if environments is None else environments.factory,
        environment_timeout=config.environment.timeout,
    )  # fmt: skip
    rewards = _load_scores(config, context)
    held_out = _load_held_out(context, config, held_out_prompts, rewards)

    # 4. The policy, its optimiser and the reference.
    begin_stage("policy")
    policy = _load_policy(
        start, config, ranks, strategy,
        lambda part: announce(begin.from_step, f"load policy: {part}"),
    )  # fmt: skip
    check_routers(config, policy)
    optimiser = make_optimiser(policy, config)
    begin_stage("reference")
    reference = load_reference(config, policy, ranks, strategy)
    check_vocabularies(policy.lm.config.vocab_size, reference.lm.config.vocab_size)
    if config.kl.reference_update.every:
        check_same_shapes(policy, reference)
    if start.saved is not None:
        if not load_training(start.saved, policy, optimiser, ranks.group):
            notify("settings", OTHER_OPTIMISER.format(config.train.optimiser))
        load_updated_reference(state, config, reference, start.saved, ranks)
    check_frozen_models(state, config, policy, reference, threads, partial(notify, "reference"))

    # 5. What generates responses.
    longest = prompts.longest + config.reply_tokens
    backend = _make_backend(config, tokenizer, policy, ranks, longest, announce)

    run = Run(
        config=config, device=ranks.device, tokenizer=tokenizer, backend=backend, prompts=prompts,
        ranks=ranks, strategy=strategy, policy=policy, learner=learner(policy, ranks, strategy),
        reference=reference, rewards=rewards, ask_early=rewards.ask_early, optimiser=optimiser,
        state=state, announce=announce, held_out=held_out, models=models, memory=memory,
        environments=environments,
        ahead=rollout_ahead(config, backend, policy, tokenizer, ranks),
        average=load_policy_average(config, policy, start.saved, ranks),
    )  # fmt: skip
    check_response_length(run)
    check_replies(run)
    use_saved_scales(run, partial(notify, REWARD_CHANGED))
    # Makes a faulty separate engine fail here instead of in the first step.
    backend.sync(policy, begin.from_step, report_nothing)
    return run


@dataclass(frozen=True)
class _StartingPoint:
    """What an attempt starts from: the models of the configuration, or a checkpoint."""

    config: RunConfig
    """With the checkpoint's live settings."""
    state: TrainingState
    policy: str
    """Folder or hub id of the policy's weights."""
    saved: Path | None
    """The checkpoint."""


def _starting_point(
    session: SessionFolder,
    config: RunConfig,
    begin: Begin,
    ranks: RankGroup,
    notify: Callable[[str], None],
) -> _StartingPoint:
    if not begin.from_step:
        state, policy = TrainingState(sampling_seed=config.seed), config.model.policy
        start = _StartingPoint(config, state, starter.resolve(policy), None)
    else:
        saved = checkpoint_path(session.checkpoints, begin.from_step)
        state, config = read_state(saved, ranks).restored(config, notify)
        policy = str(saved / (AVERAGED_POLICY if begin.average else POLICY))
        start = _StartingPoint(config, state, policy, saved)
    if begin.reseed:
        state.sampling_seed = derived_seed(state.sampling_seed, "reseed", begin.reseed)
    return start


def _load_tokenizer(start: _StartingPoint, ranks: RankGroup) -> PreTrainedTokenizerBase:
    """Loads the policy's tokenizer from where its weights are, unless a checkpoint lacks it."""
    config, saved, source = start.config, start.saved, start.policy
    if saved is not None and not (saved / POLICY / "tokenizer_config.json").is_file():
        source = starter.resolve(config.model.policy)
    return load_policy_tokenizer(config, source, ranks)


def _load_environments(
    config: RunConfig, ranks: RankGroup
) -> tuple[RunConfig, Environments | None]:
    """Returns what replies to the policy, and a configuration that tells templates about tools."""
    if not config.environment.replies:
        return config, None
    environments = Environments(config, ranks)
    if not (schemas := environments.tool_schemas()):
        return config, environments
    arguments = (config.data.template_arguments or {}) | {"tools": schemas}
    data = msgspec.structs.replace(config.data, template_arguments=arguments)
    return msgspec.structs.replace(config, data=data), environments


def _load_policy(
    start: _StartingPoint,
    config: RunConfig,
    ranks: RankGroup,
    strategy: str,
    begin_part: BeginPart,
) -> LanguageModel:
    """Loads the policy, with the value function that the configuration asks for."""
    from_reward = config.ppo.value_init == "reward_model"
    value_model = load_value_model(config, ranks, strategy) if from_reward else None
    return load_policy(config, start.policy, ranks, strategy, value_model, begin_part)


def _make_backend(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    policy: LanguageModel,
    ranks: RankGroup,
    longest: int,
    announce: Announce,
) -> RolloutBackend:
    """Creates the rollout backend; `longest` is the number of tokens of the longest context."""
    stop_criteria = StopCriteria(eos_ids(policy.lm, tokenizer), config.rollout.stop, tokenizer)
    return BACKENDS[config.rollout.engine](
        BackendContext(
            config=config, tokenizer=tokenizer, policy=policy, ranks=ranks,
            stop_criteria=stop_criteria, longest=longest, announce=announce,
        )
    )  # fmt: skip


def _load_prompts(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    ranks: RankGroup,
    begin_part: BeginPart,
) -> tuple[Prompts, list[Prompt]]:
    """Returns the training prompts and the held-out prompts. Raises UserInputError."""
    loaded = load_on_all_ranks(
        config.data, tokenizer, ranks,
        per_step=config.prompts_per_step, seed=config.seed, begin=begin_part,
    )  # fmt: skip
    return split_prompts(config, loaded, tokenizer, ranks)


def _load_held_out(
    context: LoadContext, config: RunConfig, prompts: list[Prompt], trained_on: RewardMix
) -> HeldOut | None:
    """Returns the held-out prompts with the sources of `eval.rewards`. Raises UserInputError."""
    if not prompts:
        return None
    sources = config.eval.rewards
    return HeldOut(prompts, load_rewards(context, sources, trained_on.names) if sources else None)


def _load_scores(config: RunConfig, context: LoadContext) -> RewardMix:
    """Loads the reward sources. Raises UserInputError, for example if V cannot be fitted."""
    rewards = load_rewards(context)
    if config.linear_value:
        rewards.reward_model().check_states()
    return rewards


def load_policy_average(
    config: RunConfig, policy: LanguageModel, saved: Path | None, ranks: RankGroup
) -> PolicyAverage | None:
    """Loads the averaged policy from a checkpoint, or starts one from the policy.

    Returns:
        None without `train.ema.decay`.
    """
    if config.train.ema.decay is None:
        return None
    average = PolicyAverage(policy, config.train.ema)
    if saved is not None and has_average(saved):
        load_average(saved, average.tensors(policy), ranks.group)
    return average


def load_updated_reference(
    state: TrainingState, config: RunConfig, reference: AnyModel, saved: Path, ranks: RankGroup
) -> None:
    """Loads the reference of a checkpoint, if it had been updated and is still the run's."""
    if has_other_reference(state, config):
        state.reference_updated = 0
    if state.reference_updated:
        load_reference_weights(saved, reference, ranks.group)


def first_step_config(config: RunConfig, begin: Begin) -> RunConfig:
    """Returns the configuration of the first step: `config` plus the changes to repeat.

    These come from an attempt that ended after the checkpoint, or from overrides given on resume.
    """
    for repeated in begin.repeat:
        if repeated.step == begin.from_step + 1:
            config = change_settings(config, {c.key: c.new for c in repeated.changes})
    return config


def read_state(folder: Path, ranks: RankGroup) -> SavedState:
    """Reads a checkpoint's state and verifies its hashes on rank 0; returns it on every rank.

    Raises:
        CheckpointError: on rank 0; a file is missing or damaged.
    """
    return ranks.broadcast(lambda: checkpoint_folder.read_state(folder), SavedState)
