"""Fused GPU kernels from Liger: norms, rotary embeddings and MLPs of known architectures.

A transformer layer's small operations are about forty kernels of a few microseconds each, which
take most of the time per decoded token. liger-kernel implements each operation as one Triton
kernel, including gradients.
"""

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from engine.errors import UserInputError


def use_fused_kernels(lm: PreTrainedModel, device: torch.device) -> None:
    """Makes a language model compute with fused kernels; its weights and outputs stay the same.

    Rotary embeddings are replaced for the whole architecture in this process, not for `lm` alone.

    Args:
        lm: the language model, with its weights anywhere.
        device: where it will compute.

    Raises:
        UserInputError: there is no GPU, liger-kernel is not installed, or it does not know the
            architecture.
    """
    if device.type != "cuda":
        raise UserInputError("model.kernels: liger needs a GPU; use torch")
    if find_spec("liger_kernel") is None:
        raise UserInputError(
            "model.kernels: liger needs the package liger-kernel: pip install 'rlhf-tui[gpu]'"
        )
    from liger_kernel.transformers import (  # noqa: PLC0415  # an extra; takes seconds to import
        _apply_liger_kernel_to_instance,
    )
    from liger_kernel.transformers.monkey_patch import (  # noqa: PLC0415
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    if lm.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserInputError(
            f"model.kernels: liger-kernel does not know the architecture {lm.config.model_type}; "
            "use torch"
        )
    # Liger's losses would replace `forward` and return no logits, so the engine's own are used.
    _apply_liger_kernel_to_instance(lm, cross_entropy=False, fused_linear_cross_entropy=False)
