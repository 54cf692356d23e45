"""The section `environment`: what replies to the policy, so that a response has several turns."""

from typing import Annotated, Literal

from msgspec import Meta

from engine.config.sections.base import Count, PathOrName, Seconds, Section


class EnvironmentConfig(Section, frozen=True):
    """Responses of several turns: tools, games, simulated users."""

    factory: str | None = None
    """`module:name` of a class or function that makes the environment of one response, whose method
    `reply` answers each turn of the policy. Default: none."""
    tools: list[str] = []
    """Functions that the policy can call, each as `module:function`, or the name of a method of the
    environment. Chat templates are told what they do; a turn with calls is answered with their
    results. Without `factory` and `tools`, a response is one turn."""
    call_pattern: str | None = None
    """Regular expression that finds a tool call; its group is the JSON with `name` and `arguments`
    (or `parameters`). Default: `<tool_call>…</tool_call>`, as Qwen and others write it. Calls
    within `<think>…</think>` are not run."""
    path: PathOrName | None = None
    """Folder from which modules are imported. Default: the folder of the configuration file."""
    max_turns: Annotated[int, Meta(ge=1, le=1000)] = 8
    """Maximum number of turns of the policy in a response."""
    max_tokens: Count = 512
    """Maximum number of tokens of all replies in a response. A response ends before a reply that
    does not fit."""
    role: Literal["user", "tool"] = "user"
    """Role of a reply of `factory` in a conversation, for the chat template."""
    concurrency: Annotated[int, Meta(ge=1, le=1024)] = 8
    """How many environments are called at the same time, each in a thread of its own."""
    timeout: Seconds = 600.0
    """Seconds that a call of `factory`, `reply` or the method of a score, or all tool calls of a
    turn, may take. Otherwise the run pauses before the step and shows the call."""

    turns: Literal["together", "independent"] = "together"
    """`independent` lets each response take its next turn as soon as its environment has replied;
    needs `rollout.engine: vllm`. The timing of the environments then changes results by rounding.
    With `together`, all responses take each turn together."""

    @property
    def replies(self) -> bool:
        """Whether anything replies to the policy, so that responses have several turns."""
        return self.factory is not None or bool(self.tools)
