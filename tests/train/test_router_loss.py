"""The load-balancing loss of a mixture of experts: against the model's own, and in a run."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import starter
from engine.config.sections.launch import LaunchConfig
from engine.errors import UserInputError
from engine.train.distributed.ranks import RankGroup
from engine.train.experience.generation import generate_rollout
from engine.train.models.language_model import LanguageModel
from engine.train.models.router_loss import has_router_loss
from engine.train.ppo import chunked_loss
from engine.train.ppo.forward import rollout_forward
from engine.train.step import train_step
from tests.train.architectures import write_model
from tests.train.loaded import loaded_lm

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))
WITH_EXPERTS = ("mixtral", "qwen3_moe", "qwen3_next", "granitemoehybrid", "jamba")
KEYS = ("reward.model=starter:reward", "train.learning_rate=1e-3", "ppo.router_coef=0.1")


def policy_of(folder):
    return LanguageModel(loaded_lm(folder)).eval()


def batch():
    """Tokens of two rows, of which the first is padded at the end; and their mask."""
    tokens = torch.randint(5, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 7:] = False
    return tokens, real


@pytest.mark.parametrize("kind", WITH_EXPERTS)
def test_the_loss_and_its_gradient_are_those_of_transformers(tmp_path, kind):
    folder, (tokens, real) = write_model(tmp_path / kind, kind), batch()
    policy = policy_of(folder)
    assert has_router_loss(policy.lm)
    ours = policy(tokens, torch.ones_like(tokens), 1, want="logits", balance=real).router_loss
    ours.backward()
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = lm(input_ids=tokens, attention_mask=real.long(), output_router_logits=True).aux_loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    mine = dict(policy.lm.named_parameters())
    routers = [n for n, p in lm.named_parameters() if p.grad is not None and p.grad.any()]
    assert routers
    for name, parameter in lm.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-3, atol=1e-7)


def test_only_an_architecture_for_which_transformers_has_the_loss_is_accepted(make_run, tmp_path):
    assert not has_router_loss(loaded_lm(starter.resolve("starter:policy")))
    with pytest.raises(UserInputError, match=r"ppo\.router_coef: .* for LlamaForCausalLM: leave"):
        make_run("ppo.router_coef=0.1")
    doge = AutoConfig.for_model(
        "doge", vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, is_moe=True, num_experts=4,
    )  # fmt: skip
    assert not has_router_loss(AutoModelForCausalLM.from_config(doge)), "it has other arguments"


@pytest.mark.parametrize(
    ("kind", "dense"),
    [("qwen3_moe", {"mlp_only_layers": [0, 1]}), ("granitemoehybrid", {"num_local_experts": 0})],
)
def test_a_dense_model_of_a_class_that_can_have_experts_is_refused(make_run, tmp_path, kind, dense):
    folder = write_model(tmp_path / kind, kind, **dense)
    with pytest.raises(UserInputError, match=rf"ppo\.router_coef: {folder} has no experts.*leave"):
        make_run(f"model.policy={folder}", *KEYS)


@pytest.fixture
def moe(tmp_path):
    return f"model.policy={write_model(tmp_path / 'moe', 'qwen3_moe')}"


@torch.no_grad()
def loss_of(run, rollout, rows):
    return float(rollout_forward(run.policy, rollout, rows, 1.0, balance=True).router_loss)


def test_tokens_that_pad_a_row_do_not_count(make_run, moe):
    run, _ = make_run(moe, *KEYS, "rollout.stop=[' the', 'e', 'a']")
    rollout = generate_rollout(run, 1)
    shortest, longest = rollout.host_lengths.sum(0).argsort()[[0, -1]].tolist()
    end = int(rollout.host_lengths[1, shortest])
    assert end < int(rollout.host_lengths[1, longest])
    rows = torch.tensor([shortest, longest])
    before = loss_of(run, rollout, rows)
    rollout.ids[shortest, end:] = 7
    assert loss_of(run, rollout, rows) == before
    rollout.ids[longest, :] = 7
    assert loss_of(run, rollout, rows) != before


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("parallel.activation_checkpointing=true",),
        ("model.value=separate",),
        ("model.dtype=bfloat16",),
        ("lora.rank=2",),
    ],
    ids=lambda keys: keys[0] if keys else "defaults",
)
def test_training_on_the_loss_alone_balances_the_experts(make_run, moe, keys):
    one = ("ppo.minibatches=1", "ppo.epochs=4", "ppo.max_grad_norm=1e6", "ppo.value_coef=0")
    run, _ = make_run(moe, *KEYS, *one, *keys, "ppo.router_coef=1e4", "train.learning_rate=3e-3")
    rollout = generate_rollout(run, 1)
    before = loss_of(run, rollout, rollout.rows)
    metrics, _ = train_step(run, 1, rollout)
    assert metrics["loss/router_avg"] > 2  # two experts for each token
    assert loss_of(run, rollout, rollout.rows) < before


def test_the_loss_is_the_same_with_logits_in_chunks(make_run, moe, monkeypatch):
    run, _ = make_run(moe, *KEYS)
    rollout = generate_rollout(run, 1)
    whole, _ = train_step(run, 1, rollout)
    again, _ = make_run(moe, *KEYS)
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 20_000)
    chunked, _ = train_step(again, 1, rollout)
    for name in ("loss/router_avg", "grad_norm"):
        assert chunked[name] == pytest.approx(whole[name], rel=1e-4)


def test_a_value_warm_up_trains_no_router(make_run, moe):
    run, _ = make_run(moe, *KEYS, "ppo.value_warmup=1")
    gates = {n: p.detach().clone() for n, p in run.policy.named_parameters() if "mlp.gate." in n}
    assert gates
    train_step(run, 1)
    assert all(torch.equal(p, gates[n]) for n, p in run.policy.named_parameters() if n in gates)
