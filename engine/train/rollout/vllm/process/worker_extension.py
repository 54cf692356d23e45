"""Adds methods to vLLM's workers: replacing the weights, and sampling with uniform numbers.

Weights are replaced by vLLM's layerwise reload. This module also checks what the reload does not:
that the update is complete, and that the model then holds what was sent. After any error the
weights may be partly replaced, and the process must end.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from engine.protocol.rollout.messages import Checksum
from engine.train.rollout.vllm.checksum import MASK, checksum
from engine.train.rollout.vllm.group import WeightsGroup
from engine.train.rollout.vllm.process import uniform_sampling
from engine.train.rollout.vllm.process.received_weights import (
    DTYPES,
    IncompleteUpdateError,
    Inventory,
    from_broadcast,
    from_file,
    from_ipc,
)


class RolloutWorkerExtension:
    """Mixed into vLLM's worker class; `self` has the worker's attributes."""

    model_runner: Any
    device: torch.device
    vllm_config: Any
    rank: int
    rollout_group: WeightsGroup | None = None
    """The group with rank 0 of the trainer, for broadcasts."""

    def load_weights_file(
        self, path: str, tensors: Inventory, sent: Checksum
    ) -> tuple[int, Checksum | None, float]:
        """Replaces all weights by those of a safetensors file; see :meth:`_replace_weights`.

        Args:
            path: the file.
            tensors: name and shape of each tensor that it must have.
            sent: the checksum of the sender.
        """
        return self._replace_weights(from_file(path, tensors), tensors, sent)

    def load_weights_ipc(
        self, handles: bytes, tensors: Inventory, gpu: str, sent: Checksum
    ) -> tuple[int, Checksum | None, float]:
        """Replaces all weights by those in another process's memory on this GPU.

        See :meth:`_replace_weights`.

        Args:
            handles: from the socket whose peer is a process of the same user; see
                :func:`~engine.train.rollout.vllm.process.received_weights.from_ipc`.
            tensors: name and shape of each tensor.
            gpu: identifies the sender's GPU.
            sent: the checksum of the sender.
        """
        weights = list(from_ipc(handles, tensors, gpu, self.device))
        try:
            return self._replace_weights(weights, tensors, sent)
        finally:  # queued kernels may still read them
            torch.cuda.synchronize(self.device)

    def load_weights_broadcast(
        self, path: str, size: int, tensors: Inventory, dtype: str
    ) -> tuple[int, Checksum | None, float]:
        """Replaces all weights by those that rank 0 of the trainer broadcasts.

        Args:
            path: the file through which the workers and rank 0 meet; empty if they already have.
            size: number of workers plus one.
            tensors: name and shape of each tensor, in the order of the broadcasts.
            dtype: of all of them, as in a safetensors header.
        """
        if path:
            self.rollout_group = WeightsGroup(path, 1 + self.rank, size, self.device)
        group = self.rollout_group
        if group is None:
            raise IncompleteUpdateError("the workers have not met the trainer's rank 0")
        return self._replace_weights(from_broadcast(group, tensors, DTYPES[dtype]), tensors, None)

    def _replace_weights(
        self, named: Iterable[tuple[str, Tensor]], tensors: Inventory, sent: Checksum | None
    ) -> tuple[int, Checksum | None, float]:
        """Replaces all weights.

        Args:
            named: name and content of each tensor; all of them are taken.
            tensors: name and shape of each tensor.
            sent: the checksum of the sender; None if the sender compares it.

        Returns:
            The number of tensors loaded, the checksum of what the model holds (None with tensor
            parallelism), and seconds.

        Raises:
            IncompleteUpdateError: the model has a parameter that no tensor belongs to, or the
                checksums differ.
        """
        started = time.perf_counter()
        model: nn.Module = self.model_runner.model
        expected = {name for name, _ in model.named_parameters()}
        with torch.device(self.device), set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            with recorded_before_packing(model) as packed:
                load: Any = model.load_weights
                loaded = set(load(iter(named)))
                finalize_layerwise_reload(model, self.model_runner.model_config)
            pack_tied_heads(model)
        missing = expected - loaded - tied_names(model)
        if missing:
            raise IncompleteUpdateError(
                f"the update has nothing for {len(missing)} parameters of the model, such as "
                f"{min(missing)}"
            )
        held = None
        if self.vllm_config.parallel_config.tensor_parallel_size == 1:
            held = held_checksum(model, packed)
            if sent is not None and held != tuple(sent):
                raise IncompleteUpdateError(
                    "the model does not hold the weights that were sent: their checksums differ"
                )
        return len(tensors), held, time.perf_counter() - started

    def begin_turns(self, rows: int, width: int, temperature: float, scheme: str) -> None:
        """Begins a batch of :mod:`~engine.train.rollout.vllm.process.uniform_sampling`.

        The uniform numbers come with :meth:`add_turns`.
        """
        numbers = torch.zeros(rows, width, dtype=torch.float64, device=self.device)
        uniform_sampling.begin(numbers, temperature, scheme)

    def add_turns(self, turns: list[tuple[int, bytes]]) -> None:
        """Sets the uniform numbers of the next turn of some rows."""
        for row, uniforms in turns:
            numbers = torch.frombuffer(bytearray(uniforms), dtype=torch.float64)
            uniform_sampling.set_uniforms(row, numbers.to(self.device))

    def recorded_turns(self, lengths: list[tuple[int, int]]) -> list[tuple[bytes, bytes]]:
        """Log-probabilities and entropies of some rows' turns, (tokens,) float32 each.

        Args:
            lengths: row and number of tokens of each turn.
        """
        rows = [row for row, _ in lengths]
        logprobs, entropies = (x[rows].cpu().numpy() for x in uniform_sampling.recorded())
        return [
            (logprobs[i, :n].tobytes(), entropies[i, :n].tobytes())
            for i, (_, n) in enumerate(lengths)
        ]


@contextmanager
def recorded_before_packing(model: nn.Module) -> Iterator[dict[str, Checksum]]:
    """Context that records the checksum of each parameter before vLLM packs it.

    On a CPU, vLLM replaces matrices by copies in oneDNN's layout and empties the parameters. Yields
    a dictionary of parameter → checksum, which fills while the weights are loaded.
    """
    found: dict[str, Checksum] = {}
    names = {id(layer): name for name, layer in model.named_modules()}
    methods = {id(q): q for m in model.modules() if (q := getattr(m, "quant_method", None))}

    def recording(original: Any) -> Any:
        def process(layer: nn.Module) -> None:
            for name, parameter in layer.named_parameters(recurse=False):
                found[f"{names[id(layer)]}.{name}"] = checksum([parameter])
            original(layer)

        return process

    for method in methods.values():
        method.process_weights_after_loading = recording(method.process_weights_after_loading)
    try:
        yield found
    finally:
        for method in methods.values():
            del method.process_weights_after_loading  # the class's own again


def held_checksum(model: nn.Module, packed: dict[str, Checksum]) -> Checksum:
    """Computes the checksum of all parameters, using the recorded one for packed parameters."""
    total, squares = 0, 0
    for name, parameter in model.named_parameters():
        one, two = checksum([parameter]) if parameter.numel() else packed.get(name, (0, 0))
        total, squares = total + one, squares + two
    return total & MASK, squares & MASK


def tied_names(model: nn.Module) -> set[str]:
    """Returns all names of parameters that have several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group[1:]}


def pack_tied_heads(model: nn.Module) -> None:
    """Packs an output layer again if it shares its weight with the embedding.

    On a CPU its packed copy would otherwise silently keep the old weights.
    """
    owners: dict[int, nn.Module] = {}
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            if owners.setdefault(id(parameter), layer) is not layer:
                layer.quant_method.process_weights_after_loading(layer)  # type: ignore[operator, union-attr]  # vLLM's
