"""A pretend GPU: tensors that say they are on `cuda` and are computed on the CPU.

Inside :func:`pretend_gpu` the device `cuda` can be used as on a machine that has one. Each operator
is held against what CUDA allows: a CPU tensor beside a GPU's only as a number (a 0-dim operand of a
pointwise operator), or as indices. What costs time on a GPU and none on a CPU is counted. Values
are real, so the results are the CPU's bit for bit.

A CUDA graph records operators and runs them again on the same memory; what may not be captured,
fails. Not simulated: streams, memory, and CUDA's own kernels with their rounding.
"""

import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype as group_tensors
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
MEMORY = 80 << 30
"""Bytes of the pretend GPU."""

INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default, aten._unsafe_index.Tensor,
}  # fmt: skip
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten._unique2.default, aten.repeat_interleave.Tensor,
    aten._linalg_check_errors.default,
}  # fmt: skip
"""Operators whose result, or whose result's shape, the host must know before it goes on."""
WITHOUT_KERNEL = {
    aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.empty.memory_format,
    aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default,
    aten._has_compatible_shallow_copy_type.default,
}  # fmt: skip
"""Operators that are no view and launch nothing."""


def histogram(x, *args, **kwargs):
    """`torch.histc`, which on a CPU has no kernel for integers."""
    return torch.histc(x.float(), *args, **kwargs).to(x.dtype)


ONLY_ON_A_GPU = {aten.histc.default: histogram}
"""What replaces an operator of which a CPU can do less."""


class MixedDevicesError(RuntimeError):
    """What CUDA says to operands on different devices."""


@dataclass(frozen=True)
class Counts:
    """What the host did."""

    launches: int = 0
    """Kernels launched."""
    syncs: int = 0
    """Times the host waited for the GPU: `.item()`, `bool()`, `nonzero`, copies to the host."""
    copies: int = 0
    """Copies between host and GPU, in either direction."""
    casts: int = 0
    """Weights converted to another dtype."""

    def __sub__(self, other):
        return Counts(*(getattr(self, n) - getattr(other, n) for n in self.__dataclass_fields__))


class GpuTensor(torch.Tensor):
    """Wraps a CPU tensor, :attr:`real`. C++ takes it for a CPU tensor, Python for a GPU's."""

    @staticmethod
    def __new__(cls, real, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, layout=real.layout, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        tensor.real_tensor = real
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _self: GPU)
    is_cuda = property(lambda _self: True)
    is_cpu = property(lambda _self: False)

    def __repr__(self, **_):
        return f"GpuTensor({self.real_tensor!r})"

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.real_tensor.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendGpu.active.compute(func, args, kwargs or {})


class Graph:
    """`torch.cuda.CUDAGraph`: operators, with the tensors that they read and write."""

    def __init__(self):
        self.operators = []
        self.captured_just_now = True
        self.was_reset = False

    def reset(self):
        if PretendGpu.active.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing: reset")
        self.operators.clear()
        self.was_reset = True

    def __del__(self):
        if not self.was_reset and PretendGpu.active is not None:
            PretendGpu.active.dropped_graphs += 1

    def replay(self):
        PretendGpu.active.launches["graph"] += 1
        if self.captured_just_now:  # unlike CUDA's, a capture here has computed
            self.captured_just_now = False
            return
        with torch.autocast("cpu", enabled=False):  # what it would cast is recorded
            for func, args, kwargs, outs in self.operators:
                again = func(*args, **kwargs)
                for old, new in zip(leaves([outs]), leaves([again]), strict=True):
                    if isinstance(old, torch.Tensor) and storage(old) != storage(new):
                        old.copy_(new)


@contextmanager
def capture(graph, _pool=None, **_):
    """`torch.cuda.graph`."""
    PretendGpu.active.graph = graph
    try:
        yield
    finally:
        PretendGpu.active.graph = None


def storage(x):
    return x.untyped_storage().data_ptr()


class ToHost(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x, dtype):
        real = x.real_tensor.detach().clone()
        return real if dtype is None else real.to(dtype)

    @staticmethod
    def backward(_ctx, _grad):
        raise NotImplementedError("no gradient is copied between devices here")


def real(x):
    return x.real_tensor if isinstance(x, GpuTensor) else x


def on_gpu(x):
    plain = isinstance(x, torch.Tensor) and not isinstance(x, GpuTensor)
    return GpuTensor(x, x.requires_grad) if plain else x


def each(change, x):
    """Applies a function to the leaves of an operator's argument: torch's pytree is much slower."""
    if isinstance(x, (list, tuple)):
        return type(x)(each(change, y) for y in x)
    return change(x)


def leaves(arguments):
    for x in arguments:
        if isinstance(x, (list, tuple)):
            yield from leaves(x)
        else:
            yield x


def set_data(tensor, data):
    """`tensor.data = data`; torch can do that for the two devices of a real machine."""
    if isinstance(tensor, GpuTensor) == isinstance(data, GpuTensor):
        tensor.data = data
        return
    new = data.detach()
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, new)


def names_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


class PretendGpu(TorchFunctionMode):
    """Counts, and moves what Python asks to have on `cuda`. Use :func:`pretend_gpu`."""

    active = None

    def __init__(self):
        super().__init__()
        self.launches = Counter()
        """By operator."""
        self.syncs = Counter()
        """By operator and place in the engine, as are `copies`."""
        self.copies = Counter()
        self.casts = 0
        self.graph = None
        """The one that is being captured."""
        self.dropped_graphs = 0
        """Graphs that were freed without a reset: on a GPU, that breaks a capture in progress."""

    def counts(self):
        """What has been counted until now; subtract two for what happened between them."""
        sums = [sum(c.values()) for c in (self.launches, self.syncs, self.copies)]
        return Counts(*sums, self.casts)

    # -- what Python calls ---------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self._to(args[0], "cpu" if func is torch.Tensor.cpu else GPU)
        if func is torch.Tensor.tolist and isinstance(args[0], GpuTensor):
            return self._to(args[0], "cpu").tolist()
        if func is torch.Tensor.numpy and isinstance(args[0], GpuTensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if getattr(func, "__self__", None) is torch.Tensor.data and len(args) == 2:  # assigned
            return set_data(*args)
        if names_gpu(kwargs.get("device")):  # a new tensor
            kwargs = {**kwargs, "device": "cpu"}
            made = func(*args, **kwargs)
            self._record(func, args, kwargs, made)
            if func is torch.tensor:
                self._copied("to GPU")
            elif func not in (torch.empty, torch.empty_like, torch.empty_strided):
                self.launches[func.__name__] += 1
            return on_gpu(made)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)

    def _to(self, x, *args, **kwargs):
        """`Tensor.to` in all its forms."""
        device, dtype, copy = kwargs.get("device"), kwargs.get("dtype"), kwargs.get("copy", False)
        flags = 0
        for given in args:
            if isinstance(given, torch.Tensor):
                device, dtype = given.device, given.dtype
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, bool):  # non_blocking, copy
                flags += 1
                copy = copy or (flags == 2 and given)
            elif given is not None:
                device = given
        if device is not None and torch.device(device).type == "meta":
            return torch.Tensor.to(real(x), device="meta", dtype=dtype or x.dtype)
        source, target = isinstance(x, GpuTensor), names_gpu(device)
        if device is None:
            target = source
        if source and not target:
            self._copied("to host")
            return ToHost.apply(x, dtype)
        if target and not source:
            self._copied("to GPU")
            return on_gpu(x.detach().to(dtype or x.dtype, copy=True))
        if (dtype is None or dtype == x.dtype) and not copy:
            return x
        return torch.Tensor.to(x, dtype=dtype or x.dtype, copy=copy)

    # -- operators with a GPU tensor among their arguments -------------------------------------

    def compute(self, func, args, kwargs):
        if func is torch.ops.prim.device.default:
            return GPU
        if func is aten.copy_.default and not all(isinstance(x, GpuTensor) for x in args[:2]):
            self._copied("to GPU" if isinstance(args[0], GpuTensor) else "to host")
            func(*map(real, args))
            return args[0]
        self._check_devices(func, args, kwargs)
        launched = self._count(func, args)
        real_args, real_kwargs = each(real, args), {k: each(real, v) for k, v in kwargs.items()}
        kernel = ONLY_ON_A_GPU.get(func, func)
        out = kernel(*real_args, **real_kwargs)
        if launched:  # a view of the same memory stays what it is
            self._record(kernel, real_args, real_kwargs, out)
        if func is aten._local_scalar_dense.default:
            return out
        if func is aten._to_copy.default:
            return on_gpu(out)
        return return_and_correct_aliasing(func, args, kwargs, each(on_gpu, out))

    def _check_devices(self, func, args, kwargs):
        everything = [*leaves(args), *leaves(kwargs.values())]
        host = [x for x in everything if isinstance(x, torch.Tensor) and type(x) is not GpuTensor]
        if not host:
            return
        if func in INDEXING and isinstance(args[0], GpuTensor):
            for index in args[1]:
                if any(index is x for x in host):
                    self._copied("index to GPU")
            host = [x for x in leaves(args[2:]) if any(x is y for y in host) and x.dim()]
        elif torch.Tag.pointwise in func.tags or "foreach" in str(func):
            host = [x for x in host if x.dim()]
        if host:
            shapes = [tuple(x.shape) for x in host]
            raise MixedDevicesError(f"{func} with CPU tensors {shapes} beside GPU ones, {place()}")

    def _record(self, *operator):
        if self.graph is not None:
            self.graph.operators.append(operator)

    def _copied(self, direction):
        self.copies[f"{direction}, {place()}"] += 1
        if direction == "to host":
            self._waited("copy to host")
        self._forbid_in_capture(direction)

    def _waited(self, why):
        self.syncs[f"{why}, {place()}"] += 1
        self._forbid_in_capture(why)

    def _forbid_in_capture(self, what):
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def _count(self, func, args):
        """Counts what an operator costs; returns whether it launches a kernel."""
        if func in WAITING:
            self._waited(str(func))
        elif func in INDEXING:
            masks = (torch.bool, torch.uint8)
            if any(isinstance(i, torch.Tensor) and i.dtype in masks for i in args[1]):
                self._waited("index by a mask")
        if func is aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.casts += 1
        if func is aten._local_scalar_dense.default:
            return False
        returns = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        launched = not view and func not in WITHOUT_KERNEL
        if launched:
            self.launches[str(func)] += 1
        return launched


def place():
    """The innermost line of the engine that runs."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/engine/" in name:
            return f"{name.rpartition('/engine/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the engine"


@contextmanager
def pretend_gpu():
    """Context with a GPU; yields its :class:`PretendGpu`."""
    init = torch.autocast.__init__
    is_enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype

    def host(device_type):
        return "cpu" if device_type == "cuda" else device_type

    def autocast(self, device_type, *args, **kwargs):
        init(self, host(device_type), *args, **kwargs)

    def grouped(lists, with_indices=False):
        found = group_tensors(lists, with_indices)
        on_gpu = isinstance(lists[0][0], GpuTensor)
        return {(GPU if on_gpu else device, dtype): v for (device, dtype), v in found.items()}

    swap = torch.__future__.get_swap_module_params_on_conversion()
    gpu = PretendGpu()
    with (
        mock.patch.object(torch.autocast, "__init__", autocast),
        mock.patch.object(torch, "is_autocast_enabled", lambda kind="cuda": is_enabled(host(kind))),
        mock.patch.object(torch, "get_autocast_dtype", lambda kind: dtype_of(host(kind))),
        mock.patch("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", grouped),
        # As in torch's CPU build: that for CUDA would look for a driver.
        mock.patch("torch.accelerator.current_accelerator", lambda *_, **__: None),
        mock.patch("torch.accelerator.synchronize", lambda *_: None),
        # accelerate keeps the first device that it finds for the whole process.
        mock.patch.dict("accelerate.state.PartialState._shared_state", clear=True),
        mock.patch.multiple(
            torch.cuda,
            init=lambda: None,
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            get_arch_list=list,
            get_device_capability=lambda *_: (9, 0),
            get_device_name=lambda *_: "a pretended GPU",
            CUDAGraph=Graph,
            graph=capture,
            graph_pool_handle=lambda: None,
            current_stream=lambda: None,
            stream=lambda _stream: nullcontext(),
            synchronize=lambda *_: None,
            mem_get_info=lambda *_: (MEMORY, MEMORY),
            max_memory_allocated=lambda *_: 1 << 30,
        ),
    ):
        # A parameter stays the same object when its module moves, so that tied weights stay tied.
        torch.__future__.set_swap_module_params_on_conversion(True)
        PretendGpu.active = gpu
        try:
            with gpu:
                yield gpu
        finally:
            PretendGpu.active = None
            torch.__future__.set_swap_module_params_on_conversion(swap)
