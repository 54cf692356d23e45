"""The section `train`: length of the run, optimiser, schedule and checkpoints."""

from typing import Annotated, Literal

from msgspec import Meta

from engine.config.sections.base import Count, Decay, Fraction, Positive, Seconds, Section, Whole
from engine.metrics import SCORE


class StopAt(Section, frozen=True):
    """A metric value at which the run ends; give `above` or `below`."""

    metric: str
    """Name of the metric."""
    above: float | None = None
    """The run ends when the metric is above this."""
    below: float | None = None
    """The run ends when the metric is below this."""

    def reached(self, value: float) -> bool:
        """Whether a value of the metric ends the run."""
        return (self.above is not None and value > self.above) or (
            self.below is not None and value < self.below
        )


class EMAConfig(Section, frozen=True):
    """An averaged policy: the exponential moving average of the policy's weights over the steps."""

    decay: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Decay of the policy's moving average, which is updated after each step: 0.95 averages about
    the last 20 steps. The average is evaluated, saved and exported beside the policy, and has no
    effect on training. Default: no average."""
    offload: bool = False
    """Hold the average in host memory instead of on the device."""


class TrainConfig(Section, frozen=True):
    """Length of the run, optimiser, schedule and checkpoints."""

    steps: Count = 200
    """Number of PPO steps."""
    max_hours: Positive | None = None
    """Saves a checkpoint and ends the run after this many hours of training. Default: no limit."""
    learning_rate: Annotated[float, Meta(ge=1e-12, le=10)] = 1e-5
    """Learning rate of AdamW, before the schedule is applied. About 1e-6 is usual for all weights
    of a model of a billion parameters; smaller models and adapters take more."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; `linear` and `cosine` have nearly decayed to `final_rate` at
    the last step."""
    final_rate: Fraction = 0.0
    """Where `linear` and `cosine` end, as a fraction of `learning_rate`; 0.1 is usual."""
    warmup_steps: Whole = 0
    """Number of first steps over which the learning rate rises linearly."""
    optimiser: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` holds AdamW's two moments in 8 bits, with a scale for each block of up to 256
    numbers (Dettmers et al. 2022): about 2 bytes a weight instead of 8. A fork that changes it
    starts with moments of zero."""
    adam_eps: Annotated[float, Meta(ge=1e-20, le=100)] = 1e-5
    """ε of AdamW; 1e-8 leads to a much larger KL in the first steps."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """β1 and β2 of AdamW."""
    weight_decay: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    """Weight decay of AdamW."""
    save_every: Whole = 50
    """Number of steps between checkpoints; 0 saves at the end only."""
    save_before_deadline: str | Count | None = "auto"
    """Time by which to save a checkpoint and end the run, as stopped. It ends when the remaining
    time is less than the longest step and the longest save so far, plus `deadline_margin`. A date
    and time in quotes (`'2027-01-31 14:05'`, local if it has no offset) or seconds since 1970;
    `auto`: the end of the SLURM job (SLURM_JOB_END_TIME), if there is one; null: never. The exit
    code is `launch.preempted_exit`."""
    deadline_margin: Seconds = 60.0
    """Seconds before that time by which the run should have ended."""
    keep_last: Count = 3
    """Number of newest checkpoints to keep. Those that an operator saves, with `c` or
    `rlhf-tui ctl NAME checkpoint`, stay until you delete them and do not count."""
    keep_best: Whole = 1
    """Number of further checkpoints to keep, those with the highest `best_metric`."""
    keep_before_alert: bool = True
    """Keep one more checkpoint, to roll back to: the newest one from before the first alert of a
    guard rail, until the alert has cleared."""
    best_metric: str = SCORE
    """The metric that `keep_best` compares: the mean score, or any other, such as `eval/score`."""
    stop_at: StopAt | None = None
    """Saves a checkpoint and ends the run as finished once a metric has reached a value, such as
    `{metric: eval/score, above: 2}`. Default: never."""
    ema: EMAConfig = EMAConfig()

    def saves_after(self, step: int) -> bool:
        """Whether `save_every` asks for a checkpoint after a step."""
        return bool(self.save_every) and step % self.save_every == 0
