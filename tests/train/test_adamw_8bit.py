"""AdamW with 8-bit moments: its numbers, and a run that uses it."""

import pytest
import torch
from torch import nn

from engine import starter
from engine.config import file as config_file
from engine.errors import ConfigError
from engine.protocol.rank_messages import Begin
from engine.train.load import load_run
from engine.train.ppo import adamw_8bit
from engine.train.ppo.adamw_8bit import AdamW8bit, block_size, pack, unpack
from engine.train.step import train_step
from tests.train.checkpoints import save_checkpoint

EIGHT = "train.optimiser=adamw_8bit"
RATES = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-5, "weight_decay": 0.1}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def updated(make, shape=(64, 256), steps=20):
    """A weight after some updates with drawn gradients, its optimiser and where it began."""
    weight = nn.Parameter(drawn(*shape, seed=99))
    before = weight.detach().clone()
    optimiser = make([weight])
    for step in range(steps):
        weight.grad = drawn(*shape, seed=step)
        optimiser.step()
    return weight.detach(), optimiser.state[weight], before


def eight_bit(params):
    return AdamW8bit(params, **RATES)


def full(params):
    return torch.optim.AdamW(params, **RATES)


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_comes_back_within_the_distance_of_the_values_beside_it(signed):
    numbers = drawn(32, 512) * 10 ** drawn(32, 1, seed=1)
    numbers = numbers if signed else numbers.square()
    indices, scales = pack(numbers, 4, signed=signed)
    assert (indices.dtype, indices.shape, scales.shape) == (torch.uint8, (32, 512), (32, 4))
    again = unpack(indices, scales, signed=signed)
    largest = numbers.view(32, 4, -1).abs().amax(-1, keepdim=True).expand(-1, -1, 128)
    share = (again - numbers).abs() / largest.reshape(32, 512)
    assert share.max() < (0.0071 if signed else 0.0036)  # half of 0.9 / 64 and of 0.9 / 128
    small = numbers.abs() < 0.001 * largest.reshape(32, 512)
    assert share[small].max() < 1e-4  # the values are dense near 0


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_is_rounded_to_the_nearest_value_of_the_table(signed):
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    values = unpack(every, torch.ones(1, 1), signed=signed).flatten()
    assert torch.equal(values, values.sort().values)
    borders = (values[:-1] + values[1:]) / 2
    near = [borders * (1 + 1e-6), borders * (1 - 1e-6), values]
    numbers = torch.cat([drawn(20_000) / 6, drawn(20_000).exp() / 1e4, *near]).clamp(-1, 1)
    numbers = torch.cat([numbers if signed else numbers.abs(), torch.ones(1)]).view(1, -1)
    indices, _ = pack(numbers, 1, signed=signed)
    assert torch.equal(indices.int(), torch.bucketize(numbers, borders, out_int32=True))


def test_zeros_and_blocks_of_zeros_stay_zeros():
    numbers = drawn(4, 64)
    numbers[1], numbers[2, ::2] = 0, 0
    again = unpack(*pack(numbers, 2, signed=True), signed=True)
    assert torch.equal(again == 0, numbers == 0)


def test_weights_move_almost_as_with_float32_moments():
    (ours, _, before), (theirs, _, _) = updated(eight_bit), updated(full)
    assert torch.dist(ours, theirs) < 0.05 * torch.dist(theirs, before)


def test_a_small_weight_and_one_of_odd_rows_have_float32_moments_and_adamws_numbers():
    for shape in ((15, 256), (5000,), (1001, 9)):
        assert not block_size(torch.Size(shape))
        (ours, state, _), (theirs, _, _) = updated(eight_bit, shape), updated(full, shape)
        assert state["exp_avg"].dtype == torch.float32
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_moments_take_two_bytes_a_weight_and_their_scales():
    _, state, _ = updated(eight_bit, steps=1)
    assert state["exp_avg"].nbytes == state["exp_avg_sq"].nbytes == 64 * 256
    assert state["exp_avg_scale"].shape == state["exp_avg_sq_scale"].shape == (64, 1)


def test_how_many_numbers_are_unpacked_at_a_time_makes_no_difference(monkeypatch):
    whole, _, _ = updated(eight_bit, (24, 16, 32), 3)
    monkeypatch.setattr(adamw_8bit, "AT_ONCE", {"cpu": 2000})
    parts, _, _ = updated(eight_bit, (24, 16, 32), 3)
    assert torch.equal(whole, parts)


def test_the_numbers_are_those_of_torchao_where_the_blocks_are():
    torchao = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    with torch.compiler.set_stance("force_eager"):  # it compiles its update otherwise
        theirs, state, _ = updated(lambda params: torchao.AdamW8bit(params, **RATES))
    ours, our_state, before = updated(eight_bit)
    assert torch.dist(ours, theirs) < 1e-3 * torch.dist(theirs, before)
    same = (our_state["exp_avg"] == state["exp_avg"].codes).float().mean()
    assert same > 0.999  # another order of sums may round one number across a border


@pytest.fixture
def trained(make_run):
    """A run with 8-bit moments and its session, after one step and a checkpoint."""
    run, session = make_run(EIGHT)
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    return run, session


def loaded(run, session, *overrides):
    """The session's checkpoint in a new run, and what its operator was told."""
    told = []
    config = config_file.override(session.config(), overrides)
    begin = Begin(attempt=2, from_step=1)
    again = load_run(session, config, begin, run.ranks, notify=lambda *n: told.append(n))
    return again, told


def test_the_next_step_of_a_resumed_run_is_bitwise_equal(trained, assert_same_step):
    run, session = trained
    again, told = loaded(run, session)
    assert told == []
    kinds = {t.dtype for state in again.optimiser.state.values() for t in state.values()}
    assert kinds == {torch.uint8, torch.float32}
    assert_same_step(run, again, 2)


def test_a_fork_to_another_optimiser_starts_with_moments_of_zero_and_says_so(trained):
    run, session = trained
    again, told = loaded(run, session, "train.optimiser=adamw")
    assert not again.optimiser.state
    ((rule, text),) = told
    assert rule == "settings" and "train.optimiser is adamw" in text and "from zero" in text
    for one, two in zip(run.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_resume_with_another_optimiser_is_refused():
    config = config_file.load(starter.FOLDER / "demo.yaml", [])
    other = config_file.override(config, [EIGHT])
    with pytest.raises(ConfigError, match=r"train\.optimiser cannot .* or fork instead"):
        config_file.check_resumable(config, other)
    config_file.check_forkable(config, other)
