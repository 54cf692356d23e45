"""What the modules of a language model compute with in a pass."""

import pytest
import torch

from engine.train.models.language_model import LanguageModel
from tests.train.loaded import loaded_lm


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([3, 7, 11])], ids=["last", "some", "chosen"])
def test_the_output_layer_gets_its_positions_as_one_matrix(half_policy, keep):
    """Of a slice, torch would multiply each row by a copy of the weight of its own."""
    policy, seen = LanguageModel(loaded_lm(half_policy)), []
    policy.output.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.arange(5, 32).view(3, 9)
    policy(tokens, torch.ones_like(tokens), keep)
    assert [hidden.is_contiguous() for hidden in seen] == [True]
