"""Loads everything a run works with, from the configuration or from a checkpoint."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine import starter
from engine.config import RunConfig
from engine.errors import CheckpointError, UserInputError
from engine.protocol import Begin
from engine.session import Session
from engine.settings import first_settings
from engine.train import checkpoint
from engine.train.checkpoint import TrainingState
from engine.train.data import Prompts, batch_prompts, load_prompts
from engine.train.foresight import foresee
from engine.train.generate import Ending, generate
from engine.train.models import AnyModel, BaseView, LanguageModel, fingerprint
from engine.train.optimise import make_optimiser
from engine.train.parallel import Team, settle_on
from engine.train.pretrained import eos_ids, load_policy, load_reference, load_tokenizer
from engine.train.randomness import derived_seed, sampling_uniforms
from engine.train.rewards import Answers, Normaliser, load_rewards
from engine.train.rollout import merge_rollouts
from engine.train.sharding import learner
from engine.train.shards import load_training
from engine.train.step import Announce, Run, own_rows, room_for_answers

log = logging.getLogger("engine")

STAGES = ("prompts", "reward", "policy", "reference")
"""What is loaded, in this order."""


def load_run(
    session: Session,
    config: RunConfig,
    begin: Begin,
    team: Team,
    announce: Announce,
    warn: Callable[[str], None] = lambda _text: None,
) -> Run:
    """Inputs first and weights after, so that a mistake shows before minutes of loading.

    Rank 0 reads, the others receive. `warn` is told, before the weights are loaded, where they are
    likely not to fit the memory.

    Raises:
        UserInputError: something the configuration names cannot be used.
        CheckpointError: the checkpoint to start from cannot be used.
    """
    check_shares(config, team.size)
    threads = settle_on(team, config.launch)
    source = starter.resolve(config.model.policy)
    saved: Path | None = None
    state = TrainingState(sampling_seed=config.seed, settings=first_settings(config))
    if begin.from_step:
        saved = checkpoint.folder_of(session.checkpoints, begin.from_step)
        source = str(saved / "policy")
        state = read_state(saved, team)

    stages = itertools.count()

    def loading(what: str) -> None:
        """Loading takes minutes for large models: say what, and how much is done."""
        log.info("load %s", what)
        announce(begin.from_step, f"load {what}", next(stages), len(STAGES))

    loading("prompts")
    tokenizer = load_tokenizer(source, "model.policy", team)
    prompts = share_prompts(config, tokenizer, team)
    strategy, memory = foresee(config, prompts.longest, team, warn)
    on_host = config.parallel.frozen == "offload"
    loading("reward")
    rewards = load_rewards(config.reward, tokenizer.get_vocab(), team)
    for model in rewards.models:
        model.settle(team, strategy, on_host=on_host)
    loading("policy")
    policy = load_policy(config, source, team, strategy)
    optimiser = make_optimiser(policy, config)
    loading("reference")
    reference = load_reference(config, policy, team, strategy)
    _check_vocabularies(policy.lm.config.vocab_size, reference.lm.config.vocab_size)
    if saved is not None:
        load_training(saved, policy, optimiser, team.group)

    _recognise(state, config, policy, reference, threads)
    if begin.reseed:
        state.sampling_seed = derived_seed(state.sampling_seed, "reseed", begin.reseed)

    ending = Ending(eos_ids(policy.lm, tokenizer), config.rollout.stop, tokenizer)
    run = Run(
        config=config, device=team.device, tokenizer=tokenizer, ending=ending, prompts=prompts,
        team=team, strategy=strategy, policy=policy, learner=learner(policy, team, strategy),
        reference=reference, rewards=rewards, optimiser=optimiser, state=state, announce=announce,
        memory=memory,
    )  # fmt: skip
    _check_room(run)
    if config.reward.normalise == "reference" and not begin.from_step:
        announce(0, "normalise reward")
        normaliser = Normaliser.of(reference_scores(run))
        state.reward_mean, state.reward_std = normaliser.mean, normaliser.std
    return run


def check_shares(config: RunConfig, ranks: int) -> None:
    """Whether there is work for each rank: how many they are is known only now.

    Raises:
        UserInputError: names the key that would help.
    """
    reward, prompts = config.reward, config.prompts_per_step
    if prompts < ranks:
        raise UserInputError(
            f"{ranks} ranks need as many prompts a step, and there are {prompts}: raise "
            "rollout.batch_size, or set launch.processes"
        )
    if reward.normalise == "reference" and reward.normalise_samples < ranks:
        raise UserInputError(
            f"reward.normalise_samples ({reward.normalise_samples}) must be at least the number of "
            f"ranks ({ranks})"
        )


def reference_scores(run: Run) -> Tensor:
    """Raw scores (n,) of the reference model's own answers to the first prompts."""
    config = run.config
    count = config.reward.normalise_samples
    rows = [p for s in range(1, count + 1) for p in run.prompts.for_step(s)][:count]
    batch = batch_prompts(rows, 1, run.tokenizer.eos_token_id or 0)
    limit, temperature = config.rollout.max_new_tokens, config.rollout.temperature
    uniforms = sampling_uniforms(config.seed, 0, count, limit)
    own = own_rows(run.team, count, 1)
    part = generate(
        run.reference, batch.select(own), uniforms[own], temperature, run.ending, run.tokenizer
    )
    answers = merge_rollouts(run.team, batch, part, own, limit, run.tokenizer)
    return run.rewards(Answers.of(answers, 0))[0]


def read_state(folder: Path, team: Team) -> TrainingState:
    """A checkpoint's state on every rank; rank 0 holds the files against their hashes."""
    own = msgspec.msgpack.encode(checkpoint.read_state(folder)) if team.lead else b""
    return msgspec.msgpack.decode(team.tell(own), type=TrainingState)


def share_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase, team: Team) -> Prompts:
    """All prompts, on every rank."""
    if not team.lead:
        return Prompts.unpack(team.tell())
    prompts = load_prompts(
        config.data, tokenizer, per_step=config.prompts_per_step, seed=config.seed
    )
    if team.size > 1:
        team.tell(prompts.pack())
    return prompts


def _recognise(
    state: TrainingState,
    config: RunConfig,
    policy: LanguageModel,
    reference: AnyModel,
    threads: int,
) -> None:
    """Whether the frozen models are those the run began with; no checkpoint holds them.

    Raises:
        CheckpointError: one was changed since.
    """
    weights = fingerprint(reference)
    if state.reference and state.reference != weights:
        raise CheckpointError(
            "the reference model is not the one this run began with: "
            f"{config.model.reference or config.model.policy} was changed; put it back to resume"
        )
    base = ""  # what lies under adapters
    if config.lora.rank is not None:
        base = weights if isinstance(reference, BaseView) else fingerprint(BaseView(policy))
    if state.base and state.base != base:
        raise CheckpointError(
            "the model under the adapters is not the one this run began with: "
            f"{config.model.policy} was changed; put it back to resume"
        )
    if state.threads not in (0, threads):
        log.warning(
            "%d threads now, %d before: results agree to rounding only", threads, state.threads
        )
    state.reference, state.base, state.threads = weights, base, threads


def _check_room(run: Run) -> None:
    room, wanted = room_for_answers(run), run.state.settings.max_new_tokens
    if room is not None and wanted > room:
        raise UserInputError(
            f"rollout.max_new_tokens ({wanted}) may be {room} at most: there the model ends, after "
            f"the longest prompt of {run.prompts.longest} tokens (data.max_prompt_tokens leaves "
            "out longer ones)"
        )


def _check_vocabularies(policy: int, reference: int) -> None:
    if policy != reference:
        raise UserInputError(
            f"model.reference has a vocabulary of {reference} tokens and model.policy one of "
            f"{policy}: the KL needs the same tokens in both"
        )
