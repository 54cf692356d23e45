"""What a rollout backend is asked for."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.train.data.prompts import PromptBatch


@dataclass(frozen=True)
class RolloutRequest:
    """A response of one rank to each of B prompts."""

    batch: PromptBatch
    uniforms: Tensor
    """(B, T) float64 in [0, 1), where T is the maximum number of new tokens. They are the only
    source of randomness, so that a resumed run samples the same tokens."""
    temperature: float
    """> 0."""
    per_prompt: int = 1
    """Number of adjacent rows with the same prompt."""
    limits: Tensor | None = None
    """For later turns, which continue the responses of the request before: maximum number of new
    tokens of each, at most T; (B,) int64 on the host. None: T for all."""

    def to(self, device: torch.device) -> "RolloutRequest":
        """Returns a copy on a device; only the limits stay where they are."""
        return dataclasses.replace(
            self, batch=self.batch.to(device), uniforms=self.uniforms.to(device)
        )
