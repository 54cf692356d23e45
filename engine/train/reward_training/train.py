"""Trains a reward model on judgements, evaluates it and writes its folder."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.errors import RlhfError
from engine.protocol.programs.reward_training import RewardTrainingRequest, TrainedReward
from engine.session.access import open_to_umask
from engine.session.temporary_folders import written_whole
from engine.train.distributed.ranks import RankGroup, set_threads_and_nice
from engine.train.reward_training.base import BaseModel, read_base
from engine.train.reward_training.card import CARD, RESULT, card
from engine.train.reward_training.evaluate import calibrate, held_out_agreement, scale_of
from engine.train.reward_training.fit import RewardTrainer
from engine.train.reward_training.inputs import JudgedInputs, check_same_tokens, judged_inputs
from engine.train.reward_training.split import split_judgements
from engine.train.rewards.kinds.encoding import EncodedResponses, RewardEncoding


def train_reward(request: RewardTrainingRequest, report: Callable[[str], None]) -> TrainedReward:
    """Reads the base, trains it, and writes `request.out` atomically.

    Args:
        request: the judgements and what to make of them.
        report: called with lines of progress.

    Raises:
        UserInputError: something that was given cannot be used.
        RlhfError: training does not help, or the folder cannot be written.
    """
    launch = msgspec.structs.replace(
        request.configs[0].launch, processes=1, nodes=1, rendezvous=None
    )
    ranks = RankGroup(launch)
    set_threads_and_nice(ranks, launch)
    split = split_judgements(request)
    inputs = judged_inputs(request, ranks)
    base = read_base(request, ranks, report)
    pad = base.model.config.pad_token_id  # the trainer sets it for each batch
    trainer = RewardTrainer(base, _encoded_responses(request, base, inputs), request.settings)
    report(
        f"training {base.name} on {ranks.device}: {len(split.train)} judgements to train, "
        f"{len(split.validation)} for validation, {len(split.test)} held out"
    )
    before = trainer.scores().tolist()
    fitted = trainer.fit(split, report)
    scores = trainer.scores().tolist()
    recorded = _recorded_scores(request)
    trained = held_out_agreement(split.test, scores)
    new_scale = scale_of([scores[i] for i in request.newest])
    if trained is None or new_scale is None:
        raise TypeError("there are judgements to compare in each part, and newest responses")
    good = sum(good for _, good in request.labels)
    result = TrainedReward(
        out=request.out,
        base=base.name,
        device=str(ranks.device),
        preferences=len(request.preferences),
        good=good,
        other=len(request.labels) - good,
        trained_on=len(split.train),
        validated_on=len(split.validation),
        held_out=len(split.test),
        split_by=split.by,
        epochs=len(fitted.losses),
        best_epoch=fitted.best_epoch,
        losses=fitted.losses,
        in_force=held_out_agreement(split.test, recorded),
        at_start=None if base.new_head else held_out_agreement(split.test, before),
        trained=trained,
        calibration=calibrate(split.test, scores),
        old_scale=scale_of([recorded[i] for i in request.newest]),
        new_scale=new_scale,
        label=base.label if base.model.config.num_labels > 1 else None,
        pair=base.pair,
        notes=inputs.notes,
    )
    base.model.config.pad_token_id = pad
    _write(request, result, base)
    return result


def _encoded_responses(
    request: RewardTrainingRequest, base: BaseModel, inputs: JudgedInputs
) -> EncodedResponses:
    """Encodes the judged responses as the model reads them; may change its tokenizer's truncation.

    Raises:
        UserInputError: the base cannot read the tokens of the sessions.
    """
    check_same_tokens(request, inputs.vocabularies, base.tokenizer.get_vocab(), pair=base.pair)
    encoding = RewardEncoding(
        base.tokenizer, base.model, inputs.vocabularies[0],
        max_tokens=request.settings.max_tokens, pair=base.pair,
    )  # fmt: skip
    return encoding(inputs.prompts, inputs.ids, inputs.texts, inputs.messages)


def _recorded_scores(request: RewardTrainingRequest) -> list[float | None]:
    """The scores of the sessions by response; None for all if several rewards gave them."""
    same = len({config.reward.scored_by for config in request.configs}) == 1
    return [response.score if same else None for response in request.responses]


def _write(request: RewardTrainingRequest, result: TrainedReward, base: BaseModel) -> None:
    """Writes model, tokenizer and card beside the folder, then moves them into its place."""
    out = Path(request.out)
    try:
        with written_whole(out) as part:
            base.model.save_pretrained(part)
            base.tokenizer.save_pretrained(part)
            (part / CARD).write_text(card(request, result), encoding="utf-8")
            text = msgspec.json.format(msgspec.json.encode(result), indent=1)
            (part / RESULT).write_bytes(text + b"\n")
            open_to_umask(part)
    except OSError as error:
        raise RlhfError(f"cannot write {out}: {error.strerror or error}") from error
