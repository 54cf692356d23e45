"""Weights for a rollout engine, written without a rank."""

from contextlib import closing

from engine.train.rollout.vllm.weights import WeightsFile, inventory, send_weights


def write_weights(lm, dtype, path):
    """Writes all weights of a model; returns what was written, and its checksum."""
    tensors = inventory(lm, dtype)
    with closing(WeightsFile(path, tensors, dtype)) as file:
        return tensors, send_weights(lm, dtype, file.write)
