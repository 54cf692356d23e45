"""Makes vLLM sample with our uniform numbers.

A logits processor chooses each token as :func:`engine.train.rollout.sampling.sample` does for
native rollouts, and leaves vLLM a distribution with only this token. So the token of sample i at
position t depends on (seed, step, i, t), not on vLLM's generators, its batches or its version. It
also records the log-probability at our temperature and the entropy, which vLLM does not report.

This is vLLM's interface of model runner V1; V2 refuses such processors, so that the engine selects
V1 (`VLLM_USE_V2_MODEL_RUNNER=0`).
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from engine.train.rollout.sampling import sample

ROW = "rlhf_tui_row"
"""Key of a request's `extra_args`: its row in the batch of :class:`Draw`."""


class Draw:
    """The current batch: its uniform numbers, and the records of its sampled tokens."""

    def __init__(self, uniforms: Tensor, temperature: float, scheme: str) -> None:
        """Allocates the record.

        Args:
            uniforms: (n, T) float64, on the device.
            temperature: > 0.
            scheme: `rollout.sampling`.
        """
        self.uniforms = uniforms
        self.temperature = temperature
        self.scheme = scheme
        self.logprobs = torch.zeros_like(uniforms, dtype=torch.float32)
        self.entropies = torch.zeros_like(self.logprobs)


class _Current:
    """Holds this process's draw; None before the first batch."""

    draw: Draw | None = None


def begin(uniforms: Tensor, temperature: float, scheme: str) -> None:
    """Starts a batch; called in each process of the engine before requests are added."""
    _Current.draw = Draw(uniforms, temperature, scheme)


def set_uniforms(row: int, uniforms: Tensor) -> None:
    """Sets the first of a row's uniform numbers; no request of the row may be running."""
    if _Current.draw is None:
        raise RuntimeError("no batch has begun")
    _Current.draw.uniforms[row, : len(uniforms)] = uniforms


def recorded() -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the batch, (n, T) float32 each."""
    if _Current.draw is None:
        raise RuntimeError("no batch has begun")
    return _Current.draw.logprobs, _Current.draw.entropies


class UniformSampling(LogitsProcessor):  # type: ignore[misc]  # vLLM is not in this environment
    """Keeps one token of each row of logits, the one that its uniform number chooses."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Called by vLLM."""
        del vllm_config, device, is_pin_memory
        self._slots: dict[int, tuple[int, list[int]]] = {}
        """Slot of vLLM's batch → row of the draw, and the request's output tokens so far, a list
        that vLLM appends to."""

    def is_argmax_invariant(self) -> bool:
        """True, so that vLLM calls it for sampled requests, after its own temperature of 1."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Follows the requests through vLLM's slots, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._slots.pop(slot, None)
        for slot, params, _prompt, output in batch_update.added:
            self._slots[slot] = ((params.extra_args or {})[ROW], output)
        for first, second, direction in batch_update.moved:
            moved, other = self._slots.pop(first, None), self._slots.pop(second, None)
            if moved is not None:
                self._slots[second] = moved
            if direction == MoveDirectionality.SWAP and other is not None:
                self._slots[first] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Replaces each row by one in which only the sampled token is possible.

        Args:
            logits: (slots, V) float32, changed in place.
        """
        draw = _Current.draw
        if draw is None or not self._slots:
            return logits
        slots = sorted(self._slots)
        # A request with a partly processed prompt is sampled needlessly at position 0; its record
        # is overwritten later. A request that is being stopped may be at the end.
        limit = draw.uniforms.shape[1] - 1
        places = [(row, min(len(output), limit)) for row, output in (self._slots[s] for s in slots)]
        at = torch.tensor(places, device=logits.device).unbind(1)
        index = torch.tensor(slots, device=logits.device)
        token, logprob, entropy = sample(
            logits[index], draw.uniforms[at], draw.temperature, draw.scheme
        )
        draw.logprobs[at], draw.entropies[at] = logprob, entropy
        only = torch.full_like(logits[index], -torch.inf)
        logits[index] = only.scatter_(1, token[:, None], 0.0)
        return logits
