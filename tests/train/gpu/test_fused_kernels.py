"""`model.kernels: liger`: what it asks of liger-kernel, and what it says where that cannot be."""

import sys
import types

import pytest

from engine.errors import UserInputError
from engine.train.models import fused_kernels
from engine.train.models.fused_kernels import use_fused_kernels
from tests.train.gpu.pretend import GPU

APPLY = "_apply_liger_kernel_to_instance"
"""The function that changes a model which is there already."""


@pytest.fixture
def liger(monkeypatch):
    """A liger-kernel that knows Llama and has a list of what it was asked."""
    asked = []
    package, transformers, patches = (
        types.ModuleType(f"liger_kernel{part}") for part in ("", ".transformers", ".transformers.m")
    )
    vars(transformers)[APPLY] = lambda lm, **kinds: asked.append((lm, kinds))
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for name, module in {
        "liger_kernel": package,
        "liger_kernel.transformers": transformers,
        "liger_kernel.transformers.monkey_patch": patches,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fused_kernels, "find_spec", lambda _name: package)
    return asked


def model(kind):
    return types.SimpleNamespace(config=types.SimpleNamespace(model_type=kind))


def test_layers_are_fused_and_losses_are_not(liger):
    lm = model("llama")
    use_fused_kernels(lm, GPU)
    assert liger == [(lm, {"cross_entropy": False, "fused_linear_cross_entropy": False})]


def test_an_architecture_that_liger_does_not_know_is_an_error(liger):
    with pytest.raises(UserInputError, match=r"does not know the architecture bloom; use torch"):
        use_fused_kernels(model("bloom"), GPU)
    assert liger == []


def test_without_liger_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(fused_kernels, "find_spec", lambda _name: None)
    with pytest.raises(UserInputError, match=r"rlhf-tui\[gpu\]"):
        use_fused_kernels(model("llama"), GPU)


def test_on_a_cpu_there_are_none(make_run):
    with pytest.raises(UserInputError, match=r"model\.kernels: liger needs a GPU"):
        make_run("model.kernels=liger", "launch.device=cpu")
