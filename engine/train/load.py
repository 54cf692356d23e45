"""Loads everything a run works with, from the configuration or from a checkpoint."""

import itertools
import logging
from pathlib import Path

from torch import Tensor

from engine import starter
from engine.config import RunConfig
from engine.errors import CheckpointError, UserInputError
from engine.protocol import Begin
from engine.session import Session
from engine.settings import first_settings
from engine.train import checkpoint
from engine.train.checkpoint import TrainingState
from engine.train.data import batch_prompts, load_prompts
from engine.train.models import eos_ids, fingerprint, load_policy, load_reference, load_tokenizer
from engine.train.optimise import make_optimiser
from engine.train.parallel import choose_device, settle_on
from engine.train.randomness import derived_seed, sampling_uniforms
from engine.train.rewards import Answers, Normaliser, load_rewards
from engine.train.rollout import Ending, generate
from engine.train.shards import load_training
from engine.train.step import Announce, Run

log = logging.getLogger("engine")

STAGES = ("prompts", "reward", "policy", "reference")
"""What is loaded, in this order."""


def load_run(session: Session, config: RunConfig, begin: Begin, announce: Announce) -> Run:
    """Inputs first and weights after, so that a mistake shows before minutes of loading.

    Raises:
        UserInputError: something the configuration names cannot be used.
        CheckpointError: the checkpoint to start from cannot be used.
    """
    device = choose_device(config.launch)
    threads = settle_on(device, config.launch)
    source = starter.resolve(config.model.policy)
    saved: Path | None = None
    state = TrainingState(sampling_seed=config.seed, settings=first_settings(config))
    if begin.from_step:
        saved = checkpoint.folder_of(session.checkpoints, begin.from_step)
        state = checkpoint.read_state(saved)
        source = str(saved / "policy")

    stages = itertools.count()

    def loading(what: str) -> None:
        """Loading takes minutes for large models: say what, and how much is done."""
        log.info("load %s", what)
        announce(begin.from_step, f"load {what}", next(stages), len(STAGES))

    loading("prompts")
    tokenizer = load_tokenizer(source, "model.policy")
    prompts = load_prompts(
        config.data, tokenizer, per_step=config.prompts_per_step, seed=config.seed
    )
    loading("reward")
    rewards = load_rewards(config.reward, tokenizer.get_vocab(), device)
    loading("policy")
    policy = load_policy(config, source, device)
    optimiser = make_optimiser(policy, config)
    loading("reference")
    reference = load_reference(config, device)
    _check_vocabularies(policy.lm.config.vocab_size, reference.lm.config.vocab_size)
    if saved is not None:
        load_training(saved, policy, optimiser)

    weights = fingerprint(reference)
    if state.reference and state.reference != weights:
        raise CheckpointError(
            "the reference model is not the one this run began with: "
            f"{config.model.reference or config.model.policy} was changed; put it back to resume"
        )
    if state.threads not in (0, threads):
        log.warning(
            "%d threads now, %d before: results agree to rounding only", threads, state.threads
        )
    state.reference, state.threads = weights, threads
    if begin.reseed:
        state.sampling_seed = derived_seed(state.sampling_seed, "reseed", begin.attempt)

    ending = Ending(eos_ids(policy.lm, tokenizer), config.rollout.stop, tokenizer)
    run = Run(
        config=config, device=device, tokenizer=tokenizer, ending=ending, prompts=prompts,
        policy=policy, reference=reference, rewards=rewards, optimiser=optimiser, state=state,
        announce=announce,
    )  # fmt: skip
    if config.reward.normalise == "reference" and not begin.from_step:
        announce(0, "normalise reward")
        normaliser = Normaliser.of(reference_scores(run))
        state.reward_mean, state.reward_std = normaliser.mean, normaliser.std
    return run


def reference_scores(run: Run) -> Tensor:
    """Raw scores (n,) of the reference model's own answers to the first prompts."""
    config = run.config
    count = config.reward.normalise_samples
    rows = [p for s in range(1, count + 1) for p in run.prompts.for_step(s)][:count]
    batch = batch_prompts(rows, 1, run.tokenizer.eos_token_id or 0)
    uniforms = sampling_uniforms(config.seed, 0, count, config.rollout.max_new_tokens)
    temperature = config.rollout.temperature
    answers = generate(run.reference, batch, uniforms, temperature, run.ending, run.tokenizer)
    return run.rewards(Answers.of(answers, 0))[0]


def _check_vocabularies(policy: int, reference: int) -> None:
    if policy != reference:
        raise UserInputError(
            f"model.reference has a vocabulary of {reference} tokens and model.policy one of "
            f"{policy}: the KL needs the same tokens in both"
        )
