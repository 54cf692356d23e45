"""Every metric, declared once: its name, title, unit and meaning.

A step yields one value of each. Charts, guard rails, TensorBoard, the commands and docs/metrics.md
take what they show from here. To add a metric, declare it in `METRICS` and compute it in
`engine/train`; tests hold the two together.
"""

import msgspec

SCORE = "objective/scores"
SCORE_STD = "objective/scores_std"
KL = "objective/kl"
BETA = "objective/kl_coef"
RLHF_REWARD = "objective/rlhf_reward"
ENTROPY = "policy/entropy_avg"
CLIP_FRACTION = "policy/clipfrac_avg"
NONFINITE_UPDATES = "policy/nonfinite_updates"
RESPONSE_LENGTH = "tokens/response_len_mean"
DISTINCT_2 = "text/distinct_2"
LEARNING_RATE = "lr"
STEP_TIME = "time/step"
TOKENS_PER_SECOND = "perf/tokens_per_second"
PEAK_MEMORY = "perf/peak_memory_gb"

PHASES = ("generate", "score", "reference", "optimise", "checkpoint")
"""A step's phases, in order. Each has a metric, :func:`phase_time`."""

REWARD_SOURCE = "reward/NAME"
"""The one name that stands for many: NAME is a reward source's."""


def phase_time(phase: str) -> str:
    """The metric that holds a phase's seconds."""
    return f"time/{phase}"


class Metric(msgspec.Struct, frozen=True):
    """One number a step."""

    name: str
    """TRL's, where TRL has one."""
    unit: str
    """Empty where the value has no unit."""
    description: str
    """Markdown for docs/metrics.md."""
    title: str = ""
    """Above a chart. Empty: the name."""
    chart_unit: str = ""
    """On a chart, where the title does not say it already."""
    digits: int = 3
    """Significant digits that are shown."""
    is_set: bool = False
    """Set, not measured. No moving average: it would show values that were never in force."""


METRICS = (
    Metric(
        SCORE, "score",
        "mean over responses of the score the policy is trained on: normalised, clipped, less the "
        "penalty for a missing end",
        title="score",
    ),
    Metric(SCORE_STD, "score", "standard deviation of that score over the step's responses",
           title="score, std"),
    Metric(
        KL, "nats per response",
        "Σ over tokens of log π − log π_ref, mean over responses (as in TRL)",
        title="KL", chart_unit="nats/response",
    ),
    Metric(
        "objective/kl_per_token", "nats per token",
        "the same sum over all tokens, divided by their number (as in OpenRLHF and verl)",
        title="KL per token", chart_unit="nats",
    ),
    Metric(BETA, "", "β, as used in this step", title="beta", digits=4, is_set=True),
    Metric("objective/non_score_reward", "score", "−β · KL, mean over responses"),
    Metric(RLHF_REWARD, "score", "score − β · KL, mean over responses"),
    Metric("objective/entropy", "nats per response",
           "mean over responses of −Σ log π of the sampled tokens"),
    Metric(
        ENTROPY, "nats per token",
        "mean over tokens of the entropy of the whole distribution, during generation",
        title="entropy", chart_unit="nats/token",
    ),
    Metric(
        "policy/approxkl_avg", "nats per token",
        "0.5 · mean (log ρ)² to the rollout's policy, over all updates of the step",
        title="approximate KL",
    ),
    Metric(CLIP_FRACTION, "share of tokens", "where the clip decided the loss",
           title="clip fraction"),
    Metric(
        "policy/skipped_updates", "minibatches",
        "skipped: mean ratio above 10, or a loss or gradient that is not finite",
    ),
    Metric(NONFINITE_UPDATES, "minibatches", "skipped because the loss or gradient was not finite"),
    Metric("loss/policy_avg", "", "the clipped objective's mean over response tokens"),
    Metric("loss/value_avg", "score²", "0.5 · mean (V − return)² (`ppo.advantage: gae` only)"),
    Metric("val/clipfrac_avg", "share of tokens",
           "where the value clip decided the loss (`ppo.advantage: gae` only)"),
    Metric(
        "val/explained_var", "",
        "1 − Var(return − V)/Var(return); 1 is perfect, below 0 is worse than a constant "
        "(`ppo.advantage: gae` only)",
        title="explained variance",
    ),
    Metric("val/ratio", "", "mean of ρ over response tokens"),
    Metric("val/ratio_var", "", "variance of ρ over response tokens"),
    Metric("val/num_eos_tokens", "responses", "that ended with an end-of-sequence token"),
    Metric(
        "val/rollout_logprob_gap", "nats per token",
        "largest difference between log π during generation and log π as trained on; 0 where the "
        "former is used",
    ),
    Metric(RESPONSE_LENGTH, "tokens", "mean length, end-of-sequence included",
           title="length", chart_unit="tokens"),
    Metric("tokens/truncated_frac", "share of responses", "cut off at `rollout.max_new_tokens`",
           title="cut off", chart_unit="fraction"),
    Metric(
        DISTINCT_2, "share",
        "different pairs of neighbouring words over all pairs in the step's responses; falls when "
        "responses repeat themselves or each other",
        title="distinct word pairs",
    ),
    Metric(REWARD_SOURCE, "score", "each reward source's own mean, where there are several"),
    Metric("grad_norm", "", "before clipping, mean over the step's updates",
           title="gradient norm"),
    Metric(LEARNING_RATE, "", "of this step", title="learning rate", is_set=True),
    Metric("episode", "responses", "so far"),
    Metric(phase_time("generate"), "seconds", "of the rollout, on the slowest rank"),
    Metric(phase_time("score"), "seconds", "of the reward sources, on the slowest rank"),
    Metric(
        phase_time("reference"), "seconds",
        "of the reference's log-probabilities, and of the old policy's where they are computed "
        "again, on the slowest rank",
    ),
    Metric(phase_time("optimise"), "seconds", "of the updates, on the slowest rank"),
    Metric(
        phase_time("checkpoint"), "seconds",
        "training was blocked by saving since the step before: the copy to host memory, and "
        "waiting for an earlier save",
    ),
    Metric(STEP_TIME, "seconds", "of the whole step"),
    Metric(TOKENS_PER_SECOND, "tokens per second", "response tokens, over the whole step",
           title="tokens/s"),
    Metric("perf/episodes_per_second", "responses per second", "over the whole step"),
    Metric(
        PEAK_MEMORY, "10⁹ bytes",
        "highest use so far on any rank: of the GPU's memory, or resident memory on a CPU",
    ),
)  # fmt: skip
"""In the order of docs/metrics.md."""

_BY_NAME = {metric.name: metric for metric in METRICS}


def declaration(name: str) -> Metric | None:
    """The declaration that covers a metric's name; None for a name that is not declared."""
    if name.startswith("reward/"):
        return _BY_NAME[REWARD_SOURCE]
    return _BY_NAME.get(name)


def describe(name: str) -> Metric:
    """What is known of a metric; of an undeclared one, as in a newer session, the name alone."""
    return declaration(name) or Metric(name, "", "")


def title_of(name: str) -> str:
    """What a metric is called above its chart."""
    return describe(name).title or name
