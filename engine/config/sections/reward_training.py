"""The settings of `rlhf-tui reward train`, given by `--set`; they are in no configuration."""

from typing import Annotated

from msgspec import Meta

from engine.config.sections.base import Coefficient, Count, Positive, Section, Whole

Share = Annotated[float, Meta(ge=0.05, le=0.5)]


class RewardTrainingConfig(Section, frozen=True):
    """The settings of `rlhf-tui reward train`, each given as `--set KEY=VALUE`."""

    epochs: Annotated[int, Meta(ge=1, le=1000)] = 20
    """Maximum number of passes over the judgements."""
    patience: Count = 4
    """Passes without a lower loss on the judgements for validation after which training stops."""
    batch_size: Count = 8
    """Judgements per update."""
    learning_rate: Positive | None = None
    """Peak of the learning rate. Default: 1e-4 for models below 50 million parameters, 1e-5 for
    larger ones."""
    weight_decay: Coefficient = 0.01
    """Weight decay of AdamW."""
    label_weight: Coefficient = 1.0
    """Weight of a label in the loss; a preference has weight 1."""
    centre: Coefficient = 0.01
    """Weight of the squared distance between a batch's mean score and that of the model at the
    start; comparisons do not determine the level of the scores."""
    holdout: Share = 0.2
    """Share of the judgements for evaluation, which neither train the model nor choose its
    weights."""
    validation: Share = 0.15
    """Share of the judgements that choose the pass whose weights are kept."""
    seed: Whole = 0
    """Seed of the split, of the order and of a new head."""
    max_tokens: Count = 1024
    """Tokens of prompt and response that the model reads; earlier tokens are cut off."""
    label: int | str | None = None
    """Index or name of the logit to train, if the model has several. Default: `reward.label` for
    the reward model of the session."""
    pair: bool | None = None
    """Give the tokenizer prompt and response as a pair of texts. Default: `reward.pair` for the
    reward model of the session, otherwise false."""
    revision: str | None = None
    """Branch, tag or commit of `--base` on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with `--base`; see `model.trust_remote_code`."""
