"""The section `reward`: the sources of a score, and what is done with the score."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from engine.config.sections.base import (
    Bounded,
    Coefficient,
    Count,
    PathOrName,
    Positive,
    Section,
    Whole,
)

SOURCE_KEYS = ("model", "function", "service", "judge", "environment")
"""The keys that name the origin of a score; a reward source has exactly one of them.
:mod:`engine.train.rewards.mix` has the loader of each."""


class HTTPConfig(Section, frozen=True):
    """The requests to a `service` or a `judge`."""

    token_env: str | None = None
    """Name of an environment variable that holds a bearer token. The token itself is never stored,
    logged or shown."""
    timeout: Annotated[float, Meta(ge=0.01, le=1e6)] = 60.0
    """Seconds within which the whole reply to a request must have arrived."""
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 8
    """Requests at the same time."""
    label_column: str | None = None
    """Column that is sent as `labels` with `protocol: openrlhf`. Default: empty labels."""


class JudgeConfig(Section, frozen=True):
    """What a `judge` is asked, and how its reply is read."""

    model: str | None = None
    """Name of the model, as the endpoint knows it; required for a judge."""
    template: str | None = None
    """The text that the judge reads. `{prompt}`, `{response}` and `{COLUMN}`, for a column of the
    data, are replaced; everything else stays as it is. Default: asks for a number from 1 to 10."""
    parse: str | None = None
    """Regular expression to search for in the reply; its first group is the number. Default: the
    last number in the reply, which is 8 in `8/10`."""
    scale: tuple[Bounded, Bounded] | None = None
    """Lowest and highest number of the judge, such as `[1, 10]`, which become the scores 0 and 1. A
    number outside is not used. Default: the number is the score."""
    unparsed: Bounded | None = None
    """Score of a response whose reply has no number. Default: the judge is asked again, then the
    run pauses."""
    options: dict[str, Any] | None = None
    """Further fields of the request, such as `{max_tokens: 512, seed: 1}`. `temperature` is 0
    unless it is given; `{temperature: null}` leaves it out."""


class ScoreOrigin(Section, frozen=True):
    """The keys that `reward` and each entry of `reward.mix` have in common."""

    model: PathOrName | None = None
    """A sequence classifier: a model folder, a hub id, or `starter:reward`."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub. Default: its main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model; see `model.trust_remote_code`."""
    pair: bool = False
    """Give the tokenizer of a model prompt and response as a pair of texts, as many encoders are
    trained: `[CLS] prompt [SEP] response [SEP]`."""
    label: int | str | None = None
    """Index or name of the label whose logit is the score, if the classifier has several."""
    function: str | None = None
    """`module:function`, called with the arguments that TRL passes to reward functions."""
    service: str | None = None
    """URL of a service that scores responses."""
    protocol: Literal["json", "openrlhf"] = "json"
    """Format of requests and replies: `json` as described in docs/rewards.md, `openrlhf` as a
    remote reward model of OpenRLHF."""
    judge: str | None = None
    """URL of an OpenAI-compatible chat endpoint, such as `http://localhost:8000/v1`, whose model
    rates each response."""
    environment: str | None = None
    """Name of a method of the response's environment (`environment.factory`) that returns the
    score, or a list of the scores of the policy's turns."""
    judging: JudgeConfig = JudgeConfig()
    http: HTTPConfig = HTTPConfig()


class RewardSource(ScoreOrigin, frozen=True):
    """A term of the sum: one of `model`, `function`, `service`, `judge` and `environment`."""

    weight: Annotated[float, Meta(ge=-1e6, le=1e6)] = 1.0
    """Weight of the score in the sum. With weight 0, the score is recorded, with the samples and as
    a metric, but has no effect on training."""
    normalise: Literal["none", "reference", "group"] = "none"
    """`reference`: scale this source's scores to mean 0 and standard deviation 1 over responses of
    the reference model, before they are weighted; `group`: over the responses to each prompt, for
    training only (GDPO)."""
    name: str | None = None
    """Name of the source in the metrics (`reward/NAME`)."""

    @property
    def keys_given(self) -> list[str]:
        """Those of :data:`SOURCE_KEYS` that have a value."""
        return [key for key in SOURCE_KEYS if getattr(self, key) is not None]

    @property
    def kind(self) -> str:
        """The given key; call it only after the rules were checked."""
        return self.keys_given[0]

    @property
    def value(self) -> str:
        """The value of the given key."""
        return str(getattr(self, self.kind))

    @property
    def description(self) -> str:
        """The source and what decides which number of it is the score: `model /m (label 1)`."""
        details = {
            "revision": self.revision, "label": self.label, "judge": self.judging.model,
            "scale": self.judging.scale,
        }  # fmt: skip
        words = [f"{name} {value}" for name, value in details.items() if value is not None]
        words += ["pair"] if self.pair else []
        # What follows ? in an address may be a key, which is no part of what the source is.
        value = self.value.partition("?")[0] if "://" in self.value else self.value
        return f"{self.kind} {value}" + (f" ({', '.join(words)})" if words else "")


class OverlongConfig(Section, frozen=True):
    """A penalty that grows with the length of a response near the limit (DAPO)."""

    buffer: Whole = 0
    """Tokens before `rollout.max_new_tokens` over which the penalty rises linearly from 0; 0 turns
    it off."""
    penalty: Coefficient = 1.0
    """Subtracted from the score of a response of `rollout.max_new_tokens` tokens."""


class RewardConfig(ScoreOrigin, frozen=True):
    """Where scores come from: `model`, `function`, `service`, `judge`, `environment` or `mix`."""

    mix: list[RewardSource] = []
    """Several sources; the score is the weighted sum of theirs."""
    path: PathOrName | None = None
    """Folder from which modules of `function` are imported. Default: the folder of the
    configuration file."""
    normalise: Literal["none", "reference"] = "none"
    """`reference`: scale scores to mean 0 and standard deviation 1 over responses of the reference
    model."""
    normalise_samples: Annotated[int, Meta(ge=2, le=1_000_000)] = 64
    """Responses of the reference that are scored once, before the first step, to normalise."""
    clip: Positive | None = None
    """Clips scores to ±clip, after normalising."""
    missing_eos_penalty: Coefficient | None = None
    """Subtracted from the score of a truncated response; 1 is usual with normalised scores."""
    overlong: OverlongConfig = OverlongConfig()
    batch_size: Count = 32
    """Responses per forward pass of a reward model, or per request to a service."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights and of the computation of reward models; `bfloat16` takes half the
    memory, and on a GPU a fraction of the time."""
    max_tokens: Count = 1024
    """Tokens of prompt and response that a reward model reads; earlier tokens are cut off."""
    retries: Annotated[int, Meta(ge=0, le=10)] = 3
    """How often a failing function or request is repeated, after 1, 2, 4 … seconds. Then the run
    pauses and shows the error. It resumes by itself when a service or a judge works again; after a
    function failed, unpause it."""

    def sources(self) -> list[RewardSource]:
        """The sources to be summed; a single source is a list of one."""
        if self.mix:
            return self.mix
        given = {key: getattr(self, key) for key in ScoreOrigin.__struct_fields__}
        return [RewardSource(**given)]

    def models(self) -> list[RewardSource]:
        """The sources that are reward models."""
        return [source for source in self.sources() if source.model is not None]

    @property
    def in_groups(self) -> bool:
        """Whether a source's scores are normalised within groups for training."""
        return any(source.normalise == "group" for source in self.mix)

    @property
    def scored_by(self) -> str:
        """What the scores come from, in words. Where it differs, scores are not comparable."""
        sources = self.sources()
        if len(sources) == 1 and sources[0].weight == 1.0:
            return sources[0].description
        weighted = [s for s in sources if s.weight]
        return " + ".join(f"{s.weight:g} × {s.description}" for s in weighted)
