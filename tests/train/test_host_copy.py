"""Host copies of tensors, which a save writes to disk."""

import torch

from engine.train.checkpoints.host_copy import HostCopies


def test_copies_keep_their_values_while_the_originals_change():
    copies = HostCopies()
    weight = torch.arange(6.0).view(2, 3)
    first = copies.copy({"weight": weight})
    weight += 1
    assert torch.equal(first["weight"], torch.arange(6.0).view(2, 3))


def test_a_second_save_copies_the_new_values():
    copies = HostCopies()
    weight = torch.zeros(3)
    copies.copy({"weight": weight})
    weight += 1
    assert torch.equal(copies.copy({"weight": weight})["weight"], torch.ones(3))


def test_a_transposed_tensor_is_copied_contiguously():
    copy = HostCopies().copy({"t": torch.arange(6.0).view(2, 3).T})["t"]
    assert copy.is_contiguous()
    assert torch.equal(copy, torch.arange(6.0).view(2, 3).T)
