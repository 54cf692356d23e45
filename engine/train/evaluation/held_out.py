"""What an evaluation needs besides the run: its prompts and its own reward sources."""

import logging
from dataclasses import dataclass

import msgspec
from transformers import PreTrainedTokenizerBase

from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.train.data.prompt_order import SAME_TEXT, Prompts
from engine.train.data.prompts import Prompt
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.share_prompts import load_on_all_ranks
from engine.train.rewards.mix import RewardMix

log = logging.getLogger("engine")


@dataclass(frozen=True)
class HeldOut:
    """The evaluation's part of a run."""

    prompts: list[Prompt]
    """None of them has the text of a prompt that is trained on."""
    rewards: RewardMix | None
    """The sources of `eval.rewards`; None if there are none."""


def split_prompts(
    config: RunConfig, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, ranks: RankGroup
) -> tuple[Prompts, list[Prompt]]:
    """Separates the prompts to train on from those to evaluate; the same on every rank.

    Args:
        config: the sections `data` and `eval`.
        prompts: all prompts of `data.prompts`.
        tokenizer: the policy's.
        ranks: rank 0 reads the file of `eval.prompts`.

    Returns:
        The prompts for training, and those for evaluation: none without an evaluation.

    Raises:
        UserInputError: the prompts cannot be read, too few are left for training or for the ranks,
            or each prompt of `eval.prompts` is also trained on.
    """
    evaluation = config.eval
    separate: Prompts | None = None
    if evaluation.holdout:
        loaded = len(prompts)
        prompts, separate = prompts.hold_out(evaluation.holdout)
        if (same := prompts.left_out[SAME_TEXT]) and ranks.is_lead:
            log.warning("%d of %d prompts left out: %d %s", same, loaded, same, SAME_TEXT)
    if not evaluation.every:
        return prompts, []
    if evaluation.prompts is not None:
        separate = _read(config, prompts, tokenizer, ranks)
    held_out = [] if separate is None else separate.first(evaluation.max_prompts)
    if len(held_out) < ranks.size:
        raise UserInputError(
            f"{ranks.size} ranks need at least {ranks.size} prompts to evaluate, and there are "
            f"{len(held_out)}: give more by eval.prompts or eval.holdout"
        )
    return prompts, held_out


def _read(
    config: RunConfig, trained: Prompts, tokenizer: PreTrainedTokenizerBase, ranks: RankGroup
) -> Prompts:
    evaluation = config.eval
    data = msgspec.structs.replace(
        config.data,
        prompts=evaluation.prompts or "",
        column=evaluation.column or config.data.column,
        split=evaluation.split,
        shuffle=False,
    )
    loaded = load_on_all_ranks(data, tokenizer, ranks, per_step=1, seed=0, key="eval")
    unseen = loaded.without_texts_of(trained)
    if unseen is None:
        raise UserInputError(
            f"eval.prompts: each of the {len(loaded)} prompts in {evaluation.prompts} is in "
            "data.prompts too, so none is held out"
        )
    if left_out := len(loaded) - len(unseen):
        log.warning(
            "%d of %d prompts are not evaluated: they are trained on", left_out, len(loaded)
        )
    # A reward function that takes a column of the training data is called with these, too.
    return unseen.with_columns_of(trained)
