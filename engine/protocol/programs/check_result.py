"""The result that `rlhf-tui check` gets from the process that tries a configuration."""

from msgspec import Struct


class CheckedSample(Struct, frozen=True):
    """A response of the tried step."""

    prompt: str
    response: str
    score: float
    replies: list[tuple[int, int]] | None = None
    """As in :class:`~engine.protocol.rank_messages.Sample`."""


class TimedStep(Struct, frozen=True):
    """A step that was run to measure its duration."""

    responses: int
    seconds: float


class CheckResult(Struct, frozen=True, kw_only=True):
    """The results of whole steps on two prompts, on one rank that has loaded everything."""

    device: str
    dtype: str
    policy_parameters: int
    trained_parameters: int
    prompts: int
    prompts_left_out: dict[str, int] = {}
    """Why prompts of the data are not used → how many."""
    longest_prompt: int
    """Tokens of the longest prompt."""
    responses: int
    """Responses of a tried step."""
    prompt_tokens: int
    """Tokens of the longer of the two prompts."""
    response_tokens: float
    """Mean tokens of a response."""
    turns: float | None = None
    """Mean turns of the policy in a response; None without an environment."""
    tool_calls: float | None = None
    """Mean tool calls in a response; None without tools."""
    failed_calls: float | None = None
    """The fraction of them that failed; None without any."""
    ratio: float | None
    """Mean probability ratio before the first update, which must be 1; None without an update."""
    kl: float
    """Nats to the reference before the first update; 0 unless the reference is another model."""
    score: float
    sources: dict[str, float]
    """Mean score by reward source."""
    step_seconds: float
    """Duration of a second step, without the one-time work of a first one."""
    larger_step: TimedStep | None
    """A step with more responses; None if no rank has more, or if it would take minutes."""
    phases: dict[str, float]
    """Seconds of the second step, by phase."""
    memory: float
    """Peak memory of the process during the trial, in GB."""
    planned_memory: float | None
    """Estimated peak memory of each rank of the run, in GB, as `rlhf-tui plan` prints it; on a GPU
    with the CUDA context, which `memory` is without. None if unknown."""
    warnings: list[str]
    samples: list[CheckedSample]
