"""The auxiliary loss that balances the load of experts (`ppo.router_coef`).

Source: Fedus et al. 2021, arXiv 2101.03961 (Switch Transformer, equations 4 to 6), as transformers
computes it: over the routers of all layers together. With E experts it is E · Σᵢ fᵢ · Pᵢ, where fᵢ
is the mean number of times that a token is sent to expert i, over layers and tokens, and Pᵢ the
mean probability that routers give it. k experts for each token, evenly used, make it k.
"""

import inspect
import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

FUNCTION = "load_balancing_loss_func"
"""The name of the loss in a module of transformers, which calls it in a model's forward pass."""
ARGUMENTS = 4
"""Its number of arguments: logits, number of experts, experts for each token, and mask."""


def has_router_loss(lm: PreTrainedModel) -> bool:
    """Whether transformers computes the loss for this model."""
    asks = "output_router_logits" in inspect.signature(lm.forward).parameters
    function = getattr(sys.modules[_class(lm).__module__], FUNCTION, None)
    # Doge's takes more: it has two sets of keys for its experts.
    return (
        asks and function is not None and len(inspect.signature(function).parameters) == ARGUMENTS
    )


def has_routers(lm: PreTrainedModel) -> bool:
    """Whether a layer of this model has a router: the same class may be dense.

    Granite 4.0 Micro is, for example. Its loss would raise IndexError.
    """
    recorded = lm.can_record_outputs.get("router_logits")
    kinds = recorded if isinstance(recorded, list) else [recorded]
    named = [getattr(kind, "target_class", kind) for kind in kinds]
    classes = tuple(kind for kind in named if isinstance(kind, type))
    if len(classes) < len(kinds):  # none, or a name
        return True
    return any(isinstance(part, classes) for part in lm.modules())


def load_balancing_loss(lm: PreTrainedModel, outputs: Any, real: Tensor) -> Tensor:
    """Computes the loss from the outputs of a model.

    The model's own includes tokens that pad the end, because its attention needs no mask.

    Args:
        lm: a model with :func:`has_router_loss`.
        outputs: its outputs with `output_router_logits`.
        real: (n, L) bool, false for padding.
    """
    function = getattr(sys.modules[_class(lm).__module__], FUNCTION)
    model: Any = lm
    loss: Tensor = function(
        outputs.router_logits, model.num_experts, model.num_experts_per_tok, real
    )
    return loss


def _class(lm: PreTrainedModel) -> type:
    """The model's class in transformers: `fully_shard` derives another one from it."""
    return next(c for c in type(lm).__mro__ if not c.__name__.startswith("FSDP"))
