"""Rules of the section `data`."""

from collections.abc import Iterator

from engine.config.sections.model import MIXTURE_CYCLE, DataConfig

CALLED_WITH = {
    "conversation", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "messages",
}  # fmt: skip
"""Arguments of `apply_chat_template` that are no variables of a template."""


def data_mistakes(data: DataConfig) -> Iterator[str]:
    """The mistakes in the data sets, the limits of length and the template's variables."""
    if data.min_prompt_tokens > data.max_prompt_tokens:
        yield (
            f"data.min_prompt_tokens ({data.min_prompt_tokens}) must not exceed "
            f"data.max_prompt_tokens ({data.max_prompt_tokens})"
        )
    if taken := CALLED_WITH & (data.template_arguments or {}).keys():
        yield f"data.template_arguments cannot contain {min(taken)}"
    sources = data.sources
    if not sources:
        yield "data.prompts is an empty list: name a file or a data set"
        return
    total = sum(source.weight for source in sources)
    for i, source in enumerate(sources):
        if source.weight < total / MIXTURE_CYCLE:
            yield (
                f"data.prompts[{i}].weight ({source.weight:g}) must be at least "
                f"{total / MIXTURE_CYCLE:g}: one prompt in {MIXTURE_CYCLE} of the data sets "
                "together"
            )
