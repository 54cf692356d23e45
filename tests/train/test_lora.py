"""LoRA: only the adapters are trained; the base model is frozen, and is the reference."""

import json
import math
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from engine import starter
from engine.config import file as config_file
from engine.config.sections.model import LoRAConfig
from engine.errors import CheckpointError, UserInputError
from engine.protocol.rank_messages import Begin
from engine.train.checkpoints.merge import merge
from engine.train.load import load_run
from engine.train.models.adapters import dora, lora
from engine.train.models.cpu_layers import use_cpu_layers
from engine.train.models.language_model import AdapterFreePolicy, LanguageModel, fingerprint
from engine.train.models.pretrained import load_policy, load_reference
from engine.train.step import train_step
from tests.train.architectures import write_model
from tests.train.checkpoints import save_checkpoint
from tests.train.loaded import SINGLE_RANK, loaded_lm
from tests.variants import some_of

RANK = "lora.rank=4"
FAST = "train.learning_rate=1e-3"
VARIANTS = {
    "gae, value head on the trunk": [],
    "gae, separate value trunk": ["model.value=separate"],
    "reward": ["ppo.advantage=reward"],
    "rloo": ["ppo.advantage=rloo", "rollout.per_prompt=4"],
    "some targets": ["lora.targets=[q_proj, mlp.down_proj]", "lora.alpha=4"],
}
variants = pytest.mark.parametrize(
    "overrides", some_of(VARIANTS, "gae, separate value trunk", "some targets")
)


def take_step(run, step=1):
    metrics, _ = train_step(run, step)
    run.state.step = step
    return metrics


def resumed(session):
    begin = Begin(attempt=2, from_step=1)
    return load_run(session, session.config(), begin, SINGLE_RANK)


def text(seed=0):
    """A left-padded batch: tokens, attention mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 4000, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return tokens, mask


@torch.no_grad()
def logits(model):
    return model(*text(), 9, want="logits")[0]


@pytest.fixture(scope="module")
def plain(half_policy):
    """The base model, without adapters, with the products that a run's models use."""
    model = LanguageModel(loaded_lm(half_policy))
    use_cpu_layers(model, SINGLE_RANK)
    return model


@pytest.fixture(scope="module")
def copied_base(half_policy, tmp_path_factory):
    """A copy of the base model, which a run takes for another one."""
    return shutil.copytree(half_policy, tmp_path_factory.mktemp("other") / "policy")


@pytest.fixture
def trained(shared_run):
    """A run after its first step, which no test trains further."""
    return shared_run(RANK, FAST, steps=1)


@variants
def test_only_adapters_and_the_value_head_are_trained(make_run, overrides):
    run, _ = make_run(RANK, FAST, "ppo.max_grad_norm=1e6", *overrides)
    before = {k: v.detach().clone() for k, v in run.policy.named_parameters()}
    metrics = take_step(run)
    changed = {k for k, v in run.policy.named_parameters() if not torch.equal(v, before[k])}
    trainable = {k for k, v in run.policy.named_parameters() if v.requires_grad}
    assert changed == trainable
    assert all(".lora_" in k or k.startswith("value_head.") for k in changed)
    optimised = {id(p) for group in run.optimiser.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in run.policy.parameters() if p.requires_grad}
    assert all(math.isfinite(v) for v in metrics.values())


@variants
def test_a_run_starts_at_its_reference_and_moves_away_from_it(make_run, overrides):
    run, _ = make_run(RANK, FAST, "ppo.epochs=1", "ppo.minibatches=1", *overrides)
    first, second = take_step(run), take_step(run, 2)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert second["objective/kl"] != pytest.approx(0, abs=1e-4)


def test_the_reference_is_the_base_model(trained, plain):
    run, _ = trained
    assert torch.equal(logits(run.reference), logits(plain))
    assert not torch.equal(logits(run.policy), logits(plain))
    assert fingerprint(run.reference) == run.state.reference == fingerprint(plain)


def test_the_reference_shares_the_policys_base_weights(shared_run, half_policy):
    run, _ = shared_run(RANK)
    ours = {p.data_ptr() for p in run.policy.parameters()}
    assert {p.data_ptr() for p in run.reference.parameters()} < ours
    base = sum(p.numel() for p in run.reference.parameters())
    alone = AutoModelForCausalLM.from_pretrained(half_policy)
    assert base == sum(p.numel() for p in alone.parameters())


def test_adapters_are_on_again_after_an_error_in_the_reference(trained):
    run, _ = trained
    before = logits(run.policy)
    with pytest.raises(RuntimeError):
        run.reference(torch.zeros(1, 2), torch.ones(1, 5), 1)
    assert torch.equal(logits(run.policy), before)


def test_switching_adapters_off_and_on_keeps_requires_grad(shared_run):
    run, _ = shared_run(RANK)
    layers = lora.adapted_layers(run.policy.lm)
    wanted = [p.requires_grad for p in run.policy.parameters()]
    with lora.disabled(layers):
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)
    assert [p.requires_grad for p in run.policy.parameters()] == wanted


def test_the_seed_alone_determines_the_initial_adapters(make_run):
    def first(run):
        return {k: v for k, v in run.policy.named_parameters() if "lora_A" in k}

    one, _ = make_run(RANK)
    torch.manual_seed(99)
    two, other = make_run(RANK)[0], make_run(RANK, "seed=1")[0]
    assert all(torch.equal(v, first(two)[k]) for k, v in first(one).items())
    assert not any(torch.equal(v, first(other)[k]) for k, v in first(one).items())
    drawn = [v.flatten()[:4].tolist() for v in first(one).values()]
    assert len({tuple(d) for d in drawn}) == len(drawn)


@variants
def test_the_next_step_of_a_resumed_run_is_bitwise_equal(make_run, assert_same_step, overrides):
    run, session = make_run(RANK, FAST, *overrides)
    take_step(run)
    save_checkpoint(run, session)
    assert_same_step(run, resumed(session), 2)


def test_a_checkpoint_holds_the_adapters_and_not_the_base_model(trained, half_policy):
    run, session = trained
    folder = save_checkpoint(run, session)
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    assert size < sum(p.numel() for p in run.reference.parameters())  # a quarter of its bytes
    assert not list((folder / "policy").glob("model*"))
    described = json.loads((folder / "policy" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(half_policy)
    assert (described["r"], described["lora_alpha"], described["lora_dropout"]) == (4, 8, 0.0)


@pytest.mark.parametrize("loader", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
def test_peft_and_transformers_load_a_checkpoints_adapters(trained, loader):
    run, session = trained
    folder = save_checkpoint(run, session) / "policy"
    lm = loader.from_pretrained(folder, dtype=torch.float32).eval()
    model = lm.get_base_model() if loader is AutoPeftModelForCausalLM else lm
    assert lora.adapted_layers(model)
    assert (logits(LanguageModel(model)) - logits(run.policy)).abs().max() < 5e-5
    assert AutoTokenizer.from_pretrained(folder)("The film").input_ids


def test_a_merged_policy_is_a_plain_model_with_the_same_logits(trained, tmp_path):
    run, session = trained
    save_checkpoint(run, session)
    merge(session, 1, "policy", tmp_path / "merged")
    lm = loaded_lm(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    gap = (logits(LanguageModel(lm)) - logits(run.policy)).abs().max()
    assert gap < 5e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("The film").input_ids


def test_a_merged_policy_for_which_there_is_no_room_is_refused_with_the_reason(trained, tmp_path):
    run, session = trained
    save_checkpoint(run, session)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserInputError, match=r"--policy: cannot write .*File too large"):
            merge(session, 1, "policy", tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_an_error_of_a_merge_is_one_line(trained, tmp_path):
    run, session = trained
    run.state.base = "another"
    save_checkpoint(run, session)
    done = subprocess.run(
        [sys.executable, "-m", "engine.train.checkpoints.merge", session.folder, "1",
         "policy", tmp_path / "merged"],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    assert "has changed; restore it to merge" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "merged").exists()


def test_a_changed_base_is_refused_on_a_resume(shared_run, copied_base):
    run, session = shared_run(RANK, FAST, f"model.reference={copied_base}", steps=1)
    run.state.base = "another"
    save_checkpoint(run, session)
    with pytest.raises(CheckpointError, match="model under the adapters is not the one"):
        resumed(session)


def test_a_configured_reference_is_a_separate_model(shared_run, copied_base, plain):
    run, _ = shared_run(RANK, FAST, f"model.reference={copied_base}", steps=1)
    assert not isinstance(run.reference, AdapterFreePolicy)
    assert torch.equal(logits(run.reference), logits(plain))
    assert run.state.base == run.state.reference


def test_the_reference_is_the_policy_without_adapters_only_if_it_is_of_the_same_revision():
    same = "model.revision=v2", "model.reference=starter:policy", "model.reference_revision=v2"
    for keys, shared in ((same, True), (same[:2], False), (same[1:], False), (same[:1], True)):
        config = config_file.load(starter.FOLDER / "demo.yaml", [RANK, *keys])
        policy = load_policy(config, starter.resolve("starter:policy"), SINGLE_RANK, "ddp")
        found = load_reference(config, policy, SINGLE_RANK, "ddp")
        assert isinstance(found, AdapterFreePolicy) is shared, keys


def test_a_checkpoint_of_the_other_kind_is_refused(make_run, shared_run):
    adapted, _ = shared_run(RANK)
    full, full_session = make_run()
    take_step(full)
    with pytest.raises(CheckpointError, match=r"holds no adapters, but lora\.rank is set"):
        lora.load_adapters(adapted.policy.lm, save_checkpoint(full, full_session) / "policy")
    other, session = make_run("lora.rank=2")
    take_step(other)
    folder = save_checkpoint(other, session) / "policy"
    with pytest.raises(CheckpointError, match="another model, rank or targets"):
        lora.load_adapters(adapted.policy.lm, folder)


def test_with_bfloat16_the_base_model_is_bfloat16_and_the_adapters_are_float32(make_run):
    run, _ = make_run(RANK, FAST, "model.dtype=bfloat16", "ppo.epochs=1", "ppo.minibatches=1")
    metrics = take_step(run)
    assert metrics["objective/kl"] == 0
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-3)
    assert {p.dtype for p in run.reference.parameters()} == {torch.bfloat16}
    trained = {p.dtype for p in run.policy.parameters() if p.requires_grad}
    assert trained == {torch.float32}


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "mlp", "proj"])
def test_a_target_that_is_not_a_linear_layer_is_an_error_that_lists_the_layers(make_run, target):
    with pytest.raises(UserInputError) as refused:
        make_run(RANK, f"lora.targets=[q_proj, {target}]")
    assert str(refused.value) == (
        f"lora.targets: LlamaForCausalLM has no linear layer '{target}'; it has: "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )


def test_a_router_that_computes_more_than_a_product_has_no_adapter():
    shape = PhimoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, pad_token_id=None,
    )  # fmt: skip
    model = PhimoeForCausalLM(shape).eval()
    tokens = torch.ones(1, 4, dtype=torch.int64)
    before = model(input_ids=tokens).logits
    with pytest.raises(UserInputError, match=r"no linear layer 'router'; it has: q_proj, k_proj"):
        lora.add_adapters(model, LoRAConfig(rank=2, alpha=2, targets=["router"]), seed=0, base="b")
    lora.add_adapters(model, LoRAConfig(rank=2, alpha=2), seed=0, base="b")
    assert len(lora.adapted_layers(model)) == 4
    torch.testing.assert_close(model(input_ids=tokens).logits, before)


@pytest.mark.parametrize("with_dora", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_next"])
def test_all_that_adapters_change_in_a_mixture_is_in_the_merged_weights(tmp_path, kind, with_dora):
    config = LoRAConfig(rank=2, alpha=2, dora=with_dora)
    folder = write_model(tmp_path / kind, kind)
    policy, plain = (LanguageModel(loaded_lm(folder)).eval() for _ in range(2))
    lora.add_adapters(policy.lm, config, seed=0, base=str(folder))
    dora.initialise(lora.adapted_layers(policy.lm))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    merged = {n: lora.merged_weight(*w) for n, w in lora.mergeable_weights(policy.lm).items()}
    assert not torch.allclose(logits(plain), logits(policy), atol=1e-2)
    plain.lm.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(policy), rtol=1e-3, atol=1e-3)


def test_experts_without_adapters_are_no_warning(recwarn):
    shape = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    lora.add_adapters(MixtralForCausalLM(shape), LoRAConfig(rank=2, alpha=2), seed=0, base="b")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("targets", [[], ["c_attn"]])
def test_the_transposed_layers_of_gpt2_are_adapted_saved_and_loaded(tmp_path, targets, recwarn):
    shape = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=4096, n_positions=32)
    GPT2LMHeadModel(shape).eval().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    config = LoRAConfig(rank=2, alpha=2, targets=targets)

    def adapted(seed):
        lm = loaded_lm(base)
        lora.add_adapters(lm, config, seed=seed, base=base)
        return LanguageModel(lm).eval()

    policy = adapted(0)
    expected = logits(LanguageModel(loaded_lm(base)).eval())
    assert torch.equal(logits(policy), expected)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert torch.equal(logits(AdapterFreePolicy(policy)), expected)
    assert not torch.equal(logits(policy), expected)
    (tmp_path / "adapters").mkdir()
    lora.save_adapter_config(policy.lm, tmp_path / "adapters")
    lora.save_adapter_weights(lora.adapter_tensors(policy.lm), tmp_path / "adapters")
    again = adapted(1)
    lora.load_adapters(again.lm, tmp_path / "adapters")
    assert torch.equal(logits(again), logits(policy))
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
