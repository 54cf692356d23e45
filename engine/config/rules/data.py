"""Rules of the section `data`."""

from engine.config.sections.model import MIXTURE_CYCLE, DataConfig
from engine.errors import ConfigError


def check_data(data: DataConfig) -> None:
    """Checks the limits of length and the weights of several data sets. Raises ConfigError."""
    if data.min_prompt_tokens > data.max_prompt_tokens:
        raise ConfigError(
            f"data.min_prompt_tokens ({data.min_prompt_tokens}) must not exceed "
            f"data.max_prompt_tokens ({data.max_prompt_tokens})"
        )
    sources = data.sources
    if not sources:
        raise ConfigError("data.prompts is an empty list: name a file or a data set")
    total = sum(source.weight for source in sources)
    for i, source in enumerate(sources):
        if source.weight < total / MIXTURE_CYCLE:
            raise ConfigError(
                f"data.prompts[{i}].weight ({source.weight:g}) must be at least "
                f"{total / MIXTURE_CYCLE:g}: one prompt in {MIXTURE_CYCLE} of the data sets "
                "together"
            )
