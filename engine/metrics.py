"""The declaration of every metric: name, title, unit and description.

A step has one value of each metric. Charts, guard rails, TensorBoard, the command line and
docs/metrics.md use these declarations. To add a metric, declare it in :data:`METRICS` and compute
it in `engine/train`; a test compares the two.
"""

import difflib
from collections.abc import Collection, Iterable

import msgspec

SCORE = "objective/scores"
SCORE_STD = "objective/scores_std"
KL = "objective/kl"
BETA = "objective/kl_coef"
ZERO_STD = "objective/zero_std_frac"
RLHF_REWARD = "objective/rlhf_reward"
ENTROPY = "policy/entropy_avg"
CLIP_FRACTION = "policy/clipfrac_avg"
NONFINITE_UPDATES = "policy/nonfinite_updates"
RESPONSE_LENGTH = "tokens/response_len_mean"
DISTINCT_2 = "text/distinct_2"
TRUNCATED = "tokens/truncated_frac"
REPLIES_LEFT_OUT = "environment/left_out_replies"
APPROXIMATE_KL = "policy/approxkl_avg"
EXPLAINED_VARIANCE = "val/explained_var"
GRADIENT_NORM = "grad_norm"
LEARNING_RATE = "lr"
EPISODE = "episode"
STEP_TIME = "time/step"
TOKENS_PER_SECOND = "perf/tokens_per_second"
PEAK_MEMORY = "perf/peak_memory_gb"

EVALUATE = "evaluate"
"""The phase of a held-out evaluation, which only the steps with an evaluation have."""
SYNC = "sync"
PHASES = (SYNC, "generate", "score", "reference", "fit", "optimise", EVALUATE, "checkpoint")
"""The phases of a step, in order. Each has a metric, see :func:`phase_time`. With `rollout.ahead`
:data:`SYNC` sends the weights for the next step, after `generate` or `score`."""
PHASES_OF_SOME_RUNS = (SYNC, "fit")
"""Those that depend on the configuration. Other runs do not have their metric."""

REWARD_SOURCE = "reward/NAME"
EVAL_SOURCE = "eval/reward/NAME"
"""Patterns of one metric per reward source, whose name replaces NAME."""

ROLLOUT_GAP = "val/rollout_logprob_gap"
ROLLOUT_GAP_MEAN = "val/rollout_logprob_gap_mean"
VERSION_LAG = "rollout/version_lag"

EVAL_SCORE = "eval/score"
EVAL_SCORE_CI = "eval/score_ci"
EVAL_BEST_SCORE = "eval/best_score"
EVAL_KL = "eval/kl"
EVAL_LENGTH = "eval/response_len_mean"
EVAL_TRUNCATED = "eval/truncated_frac"
EVAL_DISTINCT_2 = "eval/distinct_2"
EVAL_EMA_SCORE = "eval/ema_score"
EVAL_EMA_SCORE_CI = "eval/ema_score_ci"
EVAL_EMA_KL = "eval/ema_kl"
EVAL_EMA_LENGTH = "eval/ema_response_len_mean"
EVAL_TIME = "time/evaluate"
"""The metrics of a held-out evaluation, which only the steps with an evaluation have."""

SCORES = (SCORE, EVAL_SCORE, EVAL_EMA_SCORE)
"""Mean scores by `reward`: not comparable with those of before it was changed."""

AGREEMENT = "judged/agreement"
"""How far the scores agree with the operators' judgements. Readers compute it from labels.db, so
that it changes with each judgement; the journal does not have it."""


def phase_time(phase: str) -> str:
    """The name of the metric with the seconds of a phase."""
    return f"time/{phase}"


class Metric(msgspec.Struct, frozen=True):
    """The declaration of a metric."""

    name: str
    """The name of the same metric in TRL, if there is one."""
    unit: str
    """Empty for a value without a unit."""
    description: str
    """Markdown for docs/metrics.md; completes the name and the unit."""
    title: str = ""
    """Title of a chart; the name if empty."""
    chart_unit: str = ""
    """Unit on a chart; empty if the title implies it."""
    digits: int = 3
    """Number of significant digits to display."""
    is_set: bool = False
    """Whether the value is set rather than measured. A set value has no moving average, which would
    show values that were never in effect."""
    held_out: str = ""
    """The metric that measures the same on held-out prompts; charts draw it beside this one."""
    interval: str = ""
    """The metric that has half the width of this one's confidence interval."""

    @property
    def is_sparse(self) -> bool:
        """Whether only some steps have it: those with an evaluation, or with a judgement.

        Its few values are not averaged.
        """
        return self.name.startswith(("eval/", "judged/"))


STATISTICS = {
    "mean": "mean",
    "std": "standard deviation",
    "min": "minimum",
    "max": "maximum",
}
"""What is measured of a number that each response token has: the end of the name → its words."""


def _statistics(quantity: str, unit: str, described: str) -> list[Metric]:
    """The metrics of a number that each response token has, such as `values/mean`."""
    return [
        Metric(f"{quantity}/{name}", unit, f"{words} over tokens of {described}",
               title=f"{quantity}, {name}")
        for name, words in STATISTICS.items()
    ]  # fmt: skip


METRICS = (
    Metric(
        SCORE, "score",
        "mean over responses of the score that the policy is trained on: normalised (except within "
        "groups), clipped, less the penalty for truncation",
        title="score",
        held_out=EVAL_SCORE,
    ),
    Metric("objective/greedy_scores", "score",
           "mean score of the greedy responses that are the baseline (`ppo.advantage: remax` only)",
           title="score, greedy"),
    Metric(SCORE_STD, "score", "standard deviation of that score over the step's responses",
           title="score, std"),
    Metric(
        "objective/group_std", "score",
        "standard deviation of the scores of the responses to one prompt, mean over prompts (with "
        "`rollout.per_prompt` above 1)",
        title="score, std within prompts",
    ),
    Metric(
        ZERO_STD, "fraction of prompts",
        "prompts whose responses all have the same score (with `rollout.per_prompt` above 1)",
        title="prompts without variance", chart_unit="fraction",
    ),
    Metric(
        KL, "nats per response",
        "Σ over tokens of log π − log π_ref, mean over responses (as in TRL)",
        title="KL", chart_unit="nats/response", held_out=EVAL_KL,
    ),
    Metric(
        "objective/kl_per_token", "nats per token",
        "the same sum over all tokens, divided by their number (as in OpenRLHF and verl)",
        title="KL per token", chart_unit="nats",
    ),
    Metric(
        "objective/kl_penalty", "nats per response",
        "the same sum of the estimates of `kl.estimator`, if that is not k1",
        title="KL penalty", chart_unit="nats/response",
    ),
    Metric(BETA, "", "β, as used in this step", title="beta", digits=4, is_set=True),
    Metric("objective/non_score_reward", "score", "−β · KL, mean over responses"),
    Metric(RLHF_REWARD, "score", "score − β · KL, mean over responses"),
    Metric("objective/entropy", "nats per response",
           "mean over responses of −Σ log π of the sampled tokens"),
    Metric(
        ENTROPY, "nats per token",
        "mean over tokens of the entropy of the full distribution, during generation",
        title="entropy", chart_unit="nats/token",
    ),
    Metric(
        APPROXIMATE_KL, "nats per token",
        "0.5 · mean (log ρ)² to the rollout's policy, over all updates of the step",
        title="approximate KL",
    ),
    Metric(CLIP_FRACTION, "fraction of tokens", "tokens whose policy loss was clipped",
           title="clip fraction"),
    Metric("policy/clipfrac_high", "fraction of tokens",
           "tokens whose policy loss was clipped because the ratio was above the range"),
    Metric("policy/clipfrac_low", "fraction of tokens",
           "tokens whose policy loss was clipped because the ratio was below the range"),
    Metric("policy/dual_clipfrac", "fraction of tokens",
           "tokens whose policy loss was bounded by `ppo.dual_clip`, if set"),
    Metric(
        "policy/skipped_updates", "minibatches",
        "updates skipped because the mean ratio exceeded 10 or the loss or gradient was not finite",
    ),
    Metric(NONFINITE_UPDATES, "minibatches",
           "updates skipped because the loss or gradient was not finite"),
    Metric("loss/policy_avg", "",
           "the policy loss (`ppo.policy_loss`), aggregated over response tokens by "
           "`ppo.loss_aggregation`"),
    Metric("loss/entropy_avg", "nats per token",
           "the entropy during the updates, aggregated likewise (with `ppo.entropy_coef` only)"),
    Metric("policy/entropy_coef", "",
           "the weight of the entropy bonus in this step (with `ppo.entropy_target` only)"),
    Metric("loss/router_avg", "",
           "the load-balancing loss of experts, mean over micro-batches (with `ppo.router_coef` "
           "only): the number of experts that a token uses if all are used evenly, more if not"),
    Metric("loss/kl_avg", "nats per token",
           "the estimate of the KL in the updates, aggregated likewise "
           "(with `kl.place: loss` only)"),
    Metric("loss/value_avg", "score²",
           "0.5 · mean (V − return)² (`ppo.advantage: gae` only); with `model.value: reward_model` "
           "of the V from a fit to the other responses"),
    Metric("val/clipfrac_avg", "fraction of tokens",
           "tokens whose value loss was clipped (`ppo.advantage: gae` only)"),
    Metric(
        EXPLAINED_VARIANCE, "",
        "1 − Var(return − V)/Var(return); 1 is perfect, below 0 is worse than a constant value "
        "(`ppo.advantage: gae` only)",
        title="explained variance",
    ),
    *_statistics("advantages", "", "the advantages in the updates, whitened if `ppo.whiten`"),
    *_statistics("returns", "score",
                 "the returns that the value function learns (`ppo.advantage: gae` only)"),
    *_statistics("values", "score",
                 "the values before the updates (`ppo.advantage: gae` only)"),
    Metric("val/redrawn_prompts", "prompts",
           "prompts drawn in place of others, all attempts of the step together (with "
           "`rollout.dynamic` only)"),
    Metric("val/ratio", "", "mean of ρ over response tokens"),
    Metric("val/ratio_var", "", "variance of ρ over response tokens"),
    Metric("val/num_eos_tokens", "responses", "responses that ended with an end-of-sequence token"),
    Metric(
        ROLLOUT_GAP, "nats per token",
        "largest difference between log π during generation and log π as used in training; 0 if "
        "training uses the former",
        title="rollout gap, largest",
    ),
    Metric(ROLLOUT_GAP_MEAN, "nats per token", "mean of that difference over tokens",
           title="rollout gap"),
    Metric("val/rollout_logprob_gap_p99", "nats per token",
           "the 99th percentile of that difference: its tail", title="rollout gap, 99 %"),
    Metric("val/rollout_kl", "nats per token",
           "estimate (k3) of the KL between the distribution that sampled and the policy",
           title="rollout KL"),
    Metric("policy/rollout_weight", "",
           "mean weight of a token (with `ppo.rollout_correction` only)", title="rollout weight"),
    Metric("policy/rollout_capped_frac", "fraction of tokens",
           "tokens whose weight was beyond `ppo.rollout_correction_cap` or `_floor` (with "
           "`ppo.rollout_correction` only)"),
    Metric("policy/rollout_rejected_frac", "fraction of tokens",
           "tokens left out because they were sampled with too different probabilities (with "
           "`ppo.rollout_rejection` only)", title="rollout, left out"),
    Metric("policy/off_policy_frac", "fraction of tokens",
           "tokens of negative advantage left out because their response is too far off policy "
           "(with `ppo.off_policy_mask` only)", title="off-policy, left out"),
    Metric(
        VERSION_LAG, "updates",
        "how many updates older than the policy the weights are that sampled the step's oldest "
        "response; a run ends if this exceeds `rollout.ahead`",
        title="rollout version lag",
    ),
    Metric(RESPONSE_LENGTH, "tokens", "mean length, including the end-of-sequence token",
           title="length", chart_unit="tokens", held_out=EVAL_LENGTH),
    Metric(TRUNCATED, "fraction of responses",
           "responses truncated at `rollout.max_new_tokens`, or at a limit of `environment`",
           title="cut off", chart_unit="fraction", held_out=EVAL_TRUNCATED),
    Metric("environment/turns", "turns",
           "mean number of turns of the policy in a response (with `environment.factory` or "
           "`environment.tools` only, as the others of `environment`)", title="turns"),
    Metric("environment/tool_calls", "calls",
           "mean number of tool calls in a response (with `environment.tools` only)",
           title="tool calls"),
    Metric("environment/failed_calls", "fraction of calls",
           "tool calls that ended in an error, which the policy was told (with "
           "`environment.tools` only)", title="failed tool calls"),
    Metric("environment/reply_tokens", "tokens",
           "mean number of tokens in a response that the environment wrote", title="reply tokens"),
    Metric(REPLIES_LEFT_OUT, "fraction of responses",
           "responses that ended because a reply did not fit into `environment.max_tokens`",
           title="replies left out"),
    Metric(
        DISTINCT_2, "fraction",
        "number of distinct pairs of adjacent words over the number of pairs, in the step's "
        "responses; falls when responses repeat themselves or each other",
        title="distinct word pairs", held_out=EVAL_DISTINCT_2,
    ),
    Metric(REWARD_SOURCE, "score", "mean score of each reward source, if there are several"),
    Metric(
        EVAL_SCORE, "score",
        "mean score of the responses to the held-out prompts (`eval`), computed as for training",
        title="held-out score", interval=EVAL_SCORE_CI,
    ),
    Metric(
        EVAL_SCORE_CI, "score",
        "half the width of the 95 % confidence interval of `eval/score`: 1.96 standard errors over "
        "the prompts' means",
        title="held-out score ±",
    ),
    Metric(EVAL_BEST_SCORE, "score",
           "mean over the held-out prompts of the highest score of a prompt's responses (with an "
           "`eval.per_prompt` n above 1 only); with scores of 0 and 1 it is pass@n",
           title="held-out score, best response"),
    Metric(EVAL_KL, "nats per response",
           "KL to the reference on held-out prompts, at temperature 1",
           title="held-out KL", chart_unit="nats/response"),
    Metric(EVAL_LENGTH, "tokens", "mean length of the responses to held-out prompts",
           title="held-out length", chart_unit="tokens"),
    Metric(EVAL_TRUNCATED, "fraction of responses",
           "responses to held-out prompts that were truncated at `eval.max_new_tokens`",
           title="held-out cut off"),
    Metric(EVAL_DISTINCT_2, "fraction", "`text/distinct_2` of the responses to held-out prompts",
           title="held-out distinct word pairs"),
    Metric(
        EVAL_EMA_SCORE, "score", "`eval/score` of the averaged policy (with `train.ema` only)",
        title="held-out score, averaged policy", interval=EVAL_EMA_SCORE_CI,
    ),
    Metric(EVAL_EMA_SCORE_CI, "score", "`eval/score_ci` of the averaged policy",
           title="held-out score ±, averaged policy"),
    Metric(EVAL_EMA_KL, "nats per response", "`eval/kl` of the averaged policy",
           title="held-out KL, averaged policy", chart_unit="nats/response"),
    Metric(EVAL_EMA_LENGTH, "tokens", "`eval/response_len_mean` of the averaged policy",
           title="held-out length, averaged policy", chart_unit="tokens"),
    Metric(EVAL_SOURCE, "score",
           "mean score of each source of `eval.rewards` and, if there are several, of `reward`"),
    Metric(GRADIENT_NORM, "", "norm before clipping, mean over the step's updates",
           title="gradient norm"),
    Metric(LEARNING_RATE, "", "learning rate of this step", title="learning rate", is_set=True),
    Metric(EPISODE, "responses", "number of responses so far"),
    Metric(phase_time(SYNC), "seconds",
           "duration of sending the weights to a separate rollout engine; 0 if it had them "
           "(`rollout.engine: vllm` only)"),
    Metric(phase_time("generate"), "seconds",
           "duration of the rollout on the slowest rank; of the wait for it if it was generated "
           "ahead (`rollout.ahead: 1`)"),
    Metric(
        "time/environment", "seconds",
        "the part of it in which environments replied; with `environment.turns: independent`, in "
        "which they alone did, and nothing was generated",
    ),
    Metric(phase_time("score"), "seconds", "duration of scoring on the slowest rank"),
    Metric(
        phase_time("reference"), "seconds",
        "duration of the reference's log-probabilities, and of the old policy's if they are "
        "recomputed, on the slowest rank",
    ),
    Metric(phase_time("fit"), "seconds",
           "duration of the fit of the value function (`model.value: reward_model` only)"),
    Metric(phase_time("optimise"), "seconds", "duration of the updates on the slowest rank"),
    Metric(
        phase_time("checkpoint"), "seconds",
        "time for which saving blocked training since the previous step: the copy to host memory, "
        "and waiting for an earlier save",
    ),
    Metric(STEP_TIME, "seconds", "duration of the whole step", title="step time", chart_unit="s"),
    Metric(EVAL_TIME, "seconds", "duration of the evaluation after the step"),
    Metric(TOKENS_PER_SECOND, "tokens per second", "response tokens, mean over the whole step",
           title="tokens/s"),
    Metric("perf/episodes_per_second", "responses per second", "mean over the whole step"),
    Metric(
        PEAK_MEMORY, "10⁹ bytes",
        "peak use so far on any rank: GPU memory, or resident memory on a CPU",
    ),
)  # fmt: skip
"""In the order of docs/metrics.md."""

CONTRACT = (
    KL, "objective/kl_per_token", BETA, SCORE, SCORE_STD, RLHF_REWARD, "objective/non_score_reward",
    "objective/entropy", APPROXIMATE_KL, CLIP_FRACTION, ENTROPY, "loss/policy_avg",
    "loss/value_avg", "val/clipfrac_avg", EXPLAINED_VARIANCE, "val/ratio", "val/ratio_var",
    "val/num_eos_tokens", RESPONSE_LENGTH, TRUNCATED, DISTINCT_2, GRADIENT_NORM, LEARNING_RATE,
    EPISODE, "time/generate", "time/score", "time/reference", "time/optimise", "time/checkpoint",
    STEP_TIME, TOKENS_PER_SECOND, "perf/episodes_per_second", PEAK_MEMORY,
)  # fmt: skip
"""The metrics that every step lists in JSON, null where it has none: scripts rely on the keys.

Without a value function, for example, a run has no `loss/value_avg`.
"""

BY_READERS = (
    Metric(
        AGREEMENT, "fraction",
        "how far the scores agree with the operators' judgements: mean over the last 20 up to the "
        "step; ½ is chance ([reward-training.md](reward-training.md#agreement)). It is "
        "computed when read: charts and reports have it; the journal, guard rails and TensorBoard "
        "do not",
        title="agreement", chart_unit="with judgements", digits=2,
    ),
)  # fmt: skip
"""Metrics that no step computes, because judgements may come at any time."""

_BY_NAME = {metric.name: metric for metric in (*METRICS, *BY_READERS)}


def declaration(name: str) -> Metric | None:
    """The declaration of a metric, None if there is none. `reward/NAME` has one for every NAME."""
    for pattern in (REWARD_SOURCE, EVAL_SOURCE):
        if name.startswith(pattern.removesuffix("NAME")):
            return _BY_NAME[pattern]
    return _BY_NAME.get(name)


def nearest(name: str, known: Collection[str]) -> str | None:
    """The metric that a wrong name seems to mean, such as `objective/kl` for `kl`; None if none."""
    close = [metric for metric in known if metric.rpartition("/")[2] == name]
    return next(iter(close or difflib.get_close_matches(name, known, n=1)), None)


def describe(name: str) -> Metric:
    """The declaration of a metric; one with only the name if undeclared, as in newer sessions."""
    return declaration(name) or Metric(name, "", "")


def title_of(name: str) -> str:
    """The title of a metric's chart."""
    return describe(name).title or name


def drawn_with(name: str) -> list[str]:
    """A metric and those that its chart draws with it: the held-out one, and its interval."""
    metric = describe(name)
    held_out = metric.held_out or name
    return [n for n in dict.fromkeys((name, held_out, describe(held_out).interval)) if n]


def with_drawn(names: Iterable[str]) -> list[str]:
    """Metrics, each with those that its chart draws with it, without repetition."""
    return list(dict.fromkeys(each for name in names for each in drawn_with(name)))
