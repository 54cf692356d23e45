"""Gated MLPs that keep two tensors for the backward pass instead of four.

A gated MLP returns D(act(G x) · U x). autograd keeps G x and U x, and also act(G x) and the
product, which follow from these: half of the widest activations, a third of all that a layer keeps.
Computing them again takes two operations for each element, little beside the three matrix products.
The results are the same bit for bit. Liger's kernels (`model.kernels: liger`) do it on a GPU, too.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
"""What the MLPs of Llama, Qwen, Gemma and most others of transformers compute from `x`."""


def recompute_products(model: nn.Module) -> None:
    """Replaces the `forward` of a model's gated MLPs.

    Not together with activation checkpointing, which keeps neither of these tensors and would keep
    two of them again. Call it before others wrap the MLPs, and after Liger's kernels replaced them.
    """
    for part in model.modules():
        if is_gated_mlp(part):
            part.forward = types.MethodType(_forward, part)  # of this MLP only


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module computes :data:`GATED` and nothing else."""
    if "forward" in vars(module) or not hasattr(module, "gate_proj"):
        return False
    function = _definition(type(module).forward)
    if function is None or [a.arg for a in function.args.args] != ["self", "x"]:
        return False
    match function.body:
        case [ast.Return(value=ast.expr() as found)]:
            pass
        case [
            ast.Assign(targets=[ast.Name(id=name)], value=found),
            ast.Return(ast.Name(id=same)),
        ] if name == same:
            pass
        case _:
            return False
    return ast.dump(found) == ast.dump(ast.parse(GATED, mode="eval").body)


def _definition(forward: Any) -> ast.FunctionDef | None:
    """The parsed source of a function without decorators; None if there is none."""
    if hasattr(forward, "__wrapped__"):  # its source is that of what it wraps
        return None
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):  # generated code, or not a plain function
        return None
    if not isinstance(found, ast.FunctionDef) or found.decorator_list:
        return None
    return found


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    activated = mlp.act_fn(gate)
    if activated is gate or not activated.requires_grad:  # computed in place: the gate is lost
        return mlp.down_proj(activated * up)
    # `activated` and `product` exist until the end, so that nothing else has their addresses.
    products = Products(mlp.act_fn, gate.detach(), up.detach(), activated.data_ptr())
    with saved_tensors_hooks(products.pack, products.unpack):
        product = activated * up
        products.product_at = product.data_ptr()
        return mlp.down_proj(product)


@dataclass
class Saved:
    """In place of a tensor that autograd keeps."""

    is_product: bool
    """Whether it is the product, not the activated gate."""
    shape: torch.Size


class Products:
    """Recomputes act(G x) and its product with U x, of one call of an MLP."""

    def __init__(
        self, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, activated_at: int
    ) -> None:
        """Takes what it computes them from, and the address of act(G x)."""
        self._act, self._gate, self._up, self._activated_at = act, gate, up, activated_at
        self.product_at = 0
        """Address of the product; 0 before it is computed."""
        self._activated: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | Saved:
        """Called by autograd with a tensor to keep. Returns what is kept in its place."""
        # Views of them, as a linear layer takes, have other shapes, but the same first element.
        address = tensor.data_ptr()
        known = address and tensor.numel() == self._up.numel() and tensor.dtype == self._up.dtype
        if not known or address not in (self._activated_at, self.product_at):
            return tensor
        return Saved(address == self.product_at, tensor.shape)

    def unpack(self, kept: Tensor | Saved) -> Tensor:
        """Called by autograd in the backward pass. Returns the tensor."""
        if isinstance(kept, Tensor):
            return kept
        # The backward pass of D comes first; the activated gate is kept until that of the product.
        activated, self._activated = self._activated, None
        if activated is None:
            activated = self._act(self._gate)
        if not kept.is_product:
            return activated.view(kept.shape)
        self._activated = activated
        return (activated * self._up).view(kept.shape)
