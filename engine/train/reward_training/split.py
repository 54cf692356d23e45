"""Divides judgements into training, validation and test sets."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.config.sections.reward_training import RewardTrainingConfig
from engine.errors import UserInputError
from engine.protocol.programs.reward_training import RewardTrainingRequest
from engine.train.data.randomness import permutation

MAX_LEFT_OUT = 0.9
"""The largest share of the judgements that may be kept from training."""
MIN_PROMPTS = 10
"""Prompts from which on all judgements of a prompt are on one side of the split."""

Kind = Literal["preference", "good", "other"]


@dataclass(frozen=True)
class Judgement:
    """A preference or a label, by the indices of the responses."""

    response: int
    """The chosen or the labelled one."""
    rejected: int | None = None
    """None for a label."""
    good: bool = True
    """The label; true for a preference."""

    @property
    def kind(self) -> Kind:
        """What it is counted as, so that each part has its share of each kind."""
        if self.rejected is not None:
            return "preference"
        return "good" if self.good else "other"

    @property
    def responses(self) -> list[int]:
        """All responses that it is about."""
        return [self.response] if self.rejected is None else [self.response, self.rejected]


@dataclass(frozen=True)
class Split:
    """The judgements by their purpose."""

    train: list[Judgement] = field(default_factory=list)
    validation: list[Judgement] = field(default_factory=list)
    """Used to choose the epoch whose weights are kept."""
    test: list[Judgement] = field(default_factory=list)
    """Used only to evaluate the result."""
    by: Literal["prompt", "response"] = "prompt"
    """The unit that is never divided between two parts."""


def all_judgements(request: RewardTrainingRequest) -> list[Judgement]:
    """The preferences, then the labels."""
    preferences = [Judgement(chosen, rejected) for chosen, rejected in request.preferences]
    return preferences + [Judgement(index, good=good) for index, good in request.labels]


def split_judgements(request: RewardTrainingRequest) -> Split:
    """Divides by prompt, or by response if there are few prompts; the seed determines how.

    Groups are assigned one after another to the part that lacks most of their kinds of judgements
    (Sechidis et al. 2011, "On the stratification of multi-label data").

    Raises:
        UserInputError: no part for validation or test would have anything to compare.
    """
    settings, judgements = request.settings, all_judgements(request)
    prompts = {request.responses[i].prompt for j in judgements for i in j.responses}
    by: Literal["prompt", "response"] = "prompt" if len(prompts) >= MIN_PROMPTS else "response"
    groups = _by_prompt(request, judgements) if by == "prompt" else _by_response(judgements)
    parts = _assign(groups, settings)
    split = Split(parts["train"], parts["validation"], parts["test"], by)
    for name in ("train", "validation", "test"):
        if not can_compare(parts[name]):
            raise UserInputError(
                f"the judgements cannot be divided: those for {name} would hold no preference and "
                "labels of one kind only; judge more responses, or give --set another seed"
            )
    return split


def can_compare(judgements: Sequence[Judgement]) -> bool:
    """Whether there is a preference, or labels of both kinds."""
    kinds = {j.kind for j in judgements}
    return "preference" in kinds or {"good", "other"} <= kinds


def _by_prompt(
    request: RewardTrainingRequest, judgements: list[Judgement]
) -> list[list[Judgement]]:
    groups: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[request.responses[judgement.response].prompt].append(judgement)
    return list(groups.values())


def _by_response(judgements: list[Judgement]) -> list[list[Judgement]]:
    """Judgements that share a response, directly or through others, are one group."""
    root: dict[int, int] = {}

    def find(i: int) -> int:
        while root.setdefault(i, i) != i:
            i = root[i]
        return i

    for judgement in judgements:
        for response in judgement.responses:
            root[find(response)] = find(judgement.response)
    groups: dict[int, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        groups[find(judgement.response)].append(judgement)
    return list(groups.values())


def _assign(
    groups: list[list[Judgement]], settings: RewardTrainingConfig
) -> dict[str, list[Judgement]]:
    shares = {"test": settings.holdout, "validation": settings.validation}
    if sum(shares.values()) > MAX_LEFT_OUT:
        raise UserInputError(
            "--set holdout and --set validation leave less than a tenth to train on: lower one"
        )
    shares = {"train": 1 - sum(shares.values())} | shares
    totals = Counter(j.kind for group in groups for j in group)
    parts: dict[str, list[Judgement]] = {name: [] for name in shares}
    counts: dict[str, Counter[Kind]] = {name: Counter() for name in shares}
    order = permutation(settings.seed, "reward split", (), len(groups)).tolist()
    # Largest first: smaller groups can correct the imbalance that they cause.
    for i in sorted(order, key=lambda i: -len(groups[i])):
        kinds = Counter(j.kind for j in groups[i])
        lacks = {
            name: sum(
                n * (1 - counts[name][kind] / (share * totals[kind])) for kind, n in kinds.items()
            )
            for name, share in shares.items()
        }
        part = max(shares, key=lambda name: lacks[name])
        parts[part] += groups[i]
        counts[part] += kinds
    return parts
