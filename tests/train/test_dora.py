"""DoRA and rank-stabilised LoRA: against peft's own layers, and through a whole run."""

import importlib.util
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, inject_adapter_in_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.model import LoRAConfig
from engine.protocol.rank_messages import Begin
from engine.train.checkpoints.merge import merge
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from engine.train.models.adapters import dora, lora
from engine.train.models.language_model import AdapterFreePolicy, LanguageModel
from engine.train.step import train_step
from tests.train.checkpoints import save_checkpoint
from tests.train.loaded import loaded_lm

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))
FAST = "train.learning_rate=1e-3"
VARIANTS = {
    "DoRA": ["lora={rank: 4, dora: true}"],
    "DoRA, rank-stabilised, separate value trunk": [
        "lora={rank: 4, dora: true, rslora: true}", "model.value=separate",
    ],
    "rank-stabilised": ["lora={rank: 4, rslora: true}"],
}  # fmt: skip
variants = pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)


def small_llama():
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def small_gpt2():
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return GPT2LMHeadModel(shape).eval()


def tokens(rows=2):
    return torch.randint(5, 45, (rows, 9), generator=torch.Generator().manual_seed(1))


def logits(model):
    return model(tokens(), torch.ones_like(tokens()), 9, want="logits")[0]


def adapted(lm, **settings):
    """A policy with adapters of DoRA that change something."""
    config = LoRAConfig(rank=2, alpha=6, dora=True, **settings)
    lora.add_adapters(lm, config, seed=0, base="base")
    dora.initialise(lora.adapted_layers(lm))
    policy = LanguageModel(lm).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=generator))
    return policy


def of_peft(lm, policy, **settings):
    """The same adapters in peft's own layers."""
    config = LoraConfig(
        r=2, lora_alpha=6, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM",
        fan_in_fan_out=isinstance(lm, GPT2LMHeadModel), **settings,
    )  # fmt: skip
    theirs = inject_adapter_in_model(config, lm)
    result = theirs.load_state_dict(policy.lm.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    return theirs


def take_step(run, step=1):
    metrics, _ = train_step(run, step)
    run.state.step = step
    return metrics


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def trained(request, shared_run):
    """A run after its first step, which no test trains further."""
    return shared_run(FAST, *request.param, steps=1)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("model", [small_llama, small_gpt2])
def test_logits_and_gradients_are_those_of_pefts_layers(model, stabilised):
    policy = adapted(model(), rslora=stabilised)
    theirs = of_peft(model(), policy, use_rslora=stabilised)
    ours, wanted = logits(policy), theirs(input_ids=tokens()).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    ours.square().mean().backward()
    wanted.square().mean().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in policy.lm.named_parameters() if p.grad is not None}
    assert gradients.keys() == mine.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("model", [small_llama, small_gpt2])
def test_merged_weights_have_the_logits_of_the_adapted_model(model):
    policy = adapted(model())
    merged = {n: lora.merged_weight(*w) for n, w in lora.mergeable_weights(policy.lm).items()}
    plain = model()
    plain.load_state_dict(merged, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(logits(LanguageModel(plain)), logits(policy), atol=1e-5, rtol=0)


def test_a_pass_uses_the_norms_of_the_weights_as_they_are():
    policy = adapted(small_llama())
    with torch.no_grad():
        before = logits(policy)
        for layer in lora.adapted_layers(policy):
            layer.lora_B["default"].weight.mul_(-2)
        after = logits(policy)
        wanted = of_peft(small_llama(), policy)(input_ids=tokens()).logits
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)


def test_the_norms_are_computed_once_for_all_passes_in_one_context():
    policy = adapted(small_llama())
    layer = lora.adapted_layers(policy)[0]
    norms = dora.row_lengths(layer).norms
    with torch.no_grad(), policy.autocast("cpu"):
        first = norms.clone()
        layer.lora_B["default"].weight.zero_()
        logits(policy)
        assert torch.equal(norms, first)
    with torch.no_grad():
        logits(policy)
    assert not torch.equal(norms, first)


def test_activation_checkpointing_changes_no_gradient():
    def gradients(checkpointing):
        policy = adapted(small_llama())
        if checkpointing:
            policy.lm.activation_checkpointing_enable({"use_reentrant": False})
        policy.train()
        logits(policy).square().mean().backward()
        return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    plain = gradients(checkpointing=False)
    for name, gradient in gradients(checkpointing=True).items():
        assert torch.equal(gradient, plain[name]), name


@variants
def test_a_run_starts_at_its_reference_and_trains_every_part_of_its_adapters(make_run, overrides):
    run, _ = make_run(FAST, *overrides)
    with torch.no_grad():
        reference = logits(run.reference)
        assert torch.equal(logits(run.policy), reference)
    before = {k: v.detach().clone() for k, v in run.policy.named_parameters()}
    first = take_step(run)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    changed = {k for k, v in run.policy.named_parameters() if not torch.equal(v, before[k])}
    assert changed == {k for k, v in run.policy.named_parameters() if v.requires_grad}
    lengths = sum("magnitude" in k and "lm." in k for k in changed)
    assert lengths == (len(lora.adapted_layers(run.policy.lm)) if run.config.lora.dora else 0)
    with torch.no_grad():
        assert torch.equal(logits(run.reference), reference)


@variants
def test_the_next_step_of_a_resumed_run_is_bitwise_equal(make_run, assert_same_step, overrides):
    run, session = make_run(FAST, *overrides)
    take_step(run)
    save_checkpoint(run, session)
    again = load_run(session, session.config(), Begin(attempt=2, from_step=1), SINGLE_RANK)
    assert_same_step(run, again, 2)


@torch.no_grad()
def test_peft_loads_a_checkpoints_adapters_and_a_merge_has_the_same_logits(trained, tmp_path):
    run, session = trained
    folder = save_checkpoint(run, session) / "policy"
    settings = json.loads((folder / "adapter_config.json").read_text())
    wanted = run.config.lora
    assert (settings["use_dora"], settings["use_rslora"]) == (wanted.dora, wanted.rslora)
    lm = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = logits(run.policy)
    assert (logits(LanguageModel(lm.get_base_model())) - ours).abs().max() < 5e-5
    merge(session, 1, "policy", tmp_path / "merged")
    merged = loaded_lm(tmp_path / "merged")
    assert (logits(LanguageModel(merged)) - ours).abs().max() < 5e-5
    assert (logits(run.reference) - ours).abs().max() > 1e-3


@torch.no_grad()
def test_an_averaged_policy_is_used_with_the_norms_of_the_average(make_run, tmp_path):
    run, _ = make_run(FAST, "train.ema={decay: 0.5}", *VARIANTS["DoRA"])
    with torch.enable_grad():
        take_step(run)
    run.average.update(run.policy)
    own = logits(run.policy)
    with run.average.in_place_of(run.policy):
        averaged = logits(run.policy)
        lora.save_adapter_config(run.policy.lm, tmp_path)
        tensors = {k: v.clone() for k, v in lora.adapter_tensors(run.policy.lm).items()}
        lora.save_adapter_weights(tensors, tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (logits(LanguageModel(theirs.get_base_model())) - averaged).abs().max() < 5e-5
    assert not torch.equal(averaged, own)
    assert torch.equal(logits(run.policy), own)


def test_in_bfloat16_a_run_starts_at_its_reference_and_trains_float32_lengths(make_run):
    run, _ = make_run(
        FAST, "model.dtype=bfloat16", "ppo.epochs=1", "ppo.minibatches=1", *VARIANTS["DoRA"]
    )
    metrics = take_step(run)
    assert metrics["objective/kl"] == 0
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-3)
    trained = {p.dtype for p in run.policy.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert isinstance(run.reference, AdapterFreePolicy)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_over_packed_weights_a_run_starts_at_its_reference_and_resumes(make_run, assert_same_step):
    run, session = make_run(FAST, "lora={rank: 4, dora: true, quantise: nf4}")
    with torch.no_grad():
        assert torch.equal(logits(run.policy), logits(run.reference))
    take_step(run)
    save_checkpoint(run, session)
    again = load_run(session, session.config(), Begin(attempt=2, from_step=1), SINGLE_RANK)
    assert_same_step(run, again, 2)
