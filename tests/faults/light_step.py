"""What a rank without a model reports of a step.

The response to every prompt is the rank's "weights". In a run of tests/e2e, its *gate* is called
as it is by a rank with a model: it may block the step, and its scores are those of the samples.
"""

import ctypes
import importlib.util
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.config.schema import RunConfig
from engine.protocol.rank_messages import Sample

GATE = "gate:score"


class LightStep:
    """The samples of a run's steps."""

    def __init__(self, config: RunConfig) -> None:
        self._score = gate_of(config)
        self._prompts = prompts_of(config) if self._score else ["p"]
        self._count = config.rollout.batch_size if self._score else 1

    def samples(self, step: int, weights: str) -> list[Sample]:
        """The responses of a step; a single one, with a score of 1, without a gate."""
        indices = range(self._count)
        first = (step - 1) * self._count
        prompts = [self._prompts[(first + i) % len(self._prompts)] for i in indices]
        responses, scores = [weights] * self._count, [1.0] * self._count
        if self._score:
            state = SimpleNamespace(global_step=step)
            given = self._score(prompts=prompts, completions=responses, trainer_state=state)
            scores = [ctypes.c_float(score).value for score in given]  # too large: infinity
        return [
            Sample(
                index=i, prompt=prompts[i], response=responses[i], score=scores[i], kl=0.5,
                length=1, ended=True,
            )
            for i in indices
        ]  # fmt: skip

    def metrics(self, samples: list[Sample]) -> dict[str, float]:
        """The metrics that follow from the samples, where there is a gate."""
        return (
            {"objective/scores": statistics.fmean(s.score for s in samples)} if self._score else {}
        )


def gate_of(config: RunConfig) -> Any:
    """The gate's function; None if it is not among the run's reward sources."""
    if GATE not in [source.function for source in config.reward.mix]:
        return None
    spec = importlib.util.spec_from_file_location("gate", f"{config.reward.path}/gate.py")
    assert spec is not None
    assert spec.loader is not None
    gate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gate)
    return gate.score


def prompts_of(config: RunConfig) -> list[str]:
    """The prompts of a file of JSON lines; a single one stands for any other data set."""
    path = Path(str(config.data.prompts))
    if path.suffix != ".jsonl":
        return ["p"]
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [str(row[config.data.column]) for row in rows]
