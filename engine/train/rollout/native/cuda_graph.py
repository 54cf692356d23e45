"""Runs a function as CUDA graphs: the host launches one graph instead of hundreds of kernels."""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch.distributed.fsdp import FSDPModule

from engine.train.models.language_model import AnyModel

log = logging.getLogger("engine")


class GraphedFunction:
    """Captures a function without arguments that only changes tensors in place, one graph per key.

    The first call runs the function itself. This initialises libraries and lets autocast cast and
    cache the weights; a cast inside a capture would belong to that graph alone. Later calls capture
    a graph for each new key and replay it. If a capture fails, this is logged once, and the
    function runs without graphs.

    Graphs read and write the memory addresses of their capture. Call :meth:`release` before
    dropping the tensors that the function uses, and before leaving the autocast context it was
    called in. See "CUDA Graphs" in torch's notes on CUDA semantics.
    """

    def __init__(
        self,
        function: Callable[[], None],
        *,
        usable: bool,
        compiled: set[Hashable] | None,
    ) -> None:
        """Captures nothing yet.

        Args:
            function: what to run.
            usable: whether to use graphs at all; see :func:`can_capture`.
            compiled: if the function compiles code, the keys it has already run with; else None. It
                is run once with each new key before the capture, and the key is added.
        """
        self._function = function
        self._usable = usable
        self._compiled = compiled
        self._warm = False
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        # One pool for all graphs: they run one after another, and no result lives in it.
        self._pool = torch.cuda.graph_pool_handle() if usable else None

    def __call__(self, key: Hashable) -> None:
        """Runs the function; `key` identifies the shapes and the memory that it works on."""
        ready = self._warm and (self._compiled is None or key in self._compiled)
        if self._usable and ready and key not in self._graphs:
            self._capture(key)
        graph = self._graphs.get(key)
        if graph is None:
            self._function()
            self._warm = True
            if self._compiled is not None:
                self._compiled.add(key)
        else:
            graph.replay()

    def _capture(self, key: Hashable) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                # After a failed capture `torch.cuda.graph` leaves its own stream current.
                torch.cuda.stream(torch.cuda.current_stream()),
                # thread_local: the saving thread may use the GPU meanwhile.
                torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"),
                _without_garbage_collection(),
            ):
                self._function()
        except RuntimeError as error:
            self._usable = False
            log.warning("generating without CUDA graphs: %s", str(error).strip().split("\n")[0])
        else:
            self._graphs[key] = graph

    def release(self) -> None:
        """Frees the graphs and drops the function; it cannot be called afterwards.

        The function is often a method of the object that holds this one. Such a reference cycle
        would keep a key-value cache alive until the garbage collector runs, which is seldom.
        """
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._usable = False
        self._function = _forgotten


def _forgotten() -> None:
    raise RuntimeError("the function was released")


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keeps the garbage collector from freeing graphs, which CUDA forbids during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def can_capture(model: AnyModel, device: torch.device) -> bool:
    """Whether a model's forward pass may be captured: on a GPU, and not sharded.

    FSDP2's hooks synchronise with streams of their own.
    """
    return device.type == "cuda" and not any(isinstance(m, FSDPModule) for m in model.modules())
