"""The memory planner: properties of the estimate for any shapes, and the advice."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import starter
from engine.config import file as config_file
from engine.launch.environment import MALLOC_SETTINGS
from engine.memory.advice import (
    can_start,
    changes_to_fit,
    fits,
    layout_at_start,
    room_for_micro_batch,
    shortage,
)
from engine.memory.capacity import Capacity, of_host, supposed_gpus
from engine.memory.estimate import SMALL_BLOCK, estimate
from engine.memory.model import Layout, Models, Shape, configured, layouts
from engine.memory.rollout_engine import beside_ranks, engine_memory

WEIGHTS = ("policy", "optimiser", "reference", "reward", "gradients")


def shape(hidden=576, layers=30, vocabulary=49152, heads=9, groups=3, in_linear=0):
    size = hidden // heads
    inner = 8 * hidden // 3
    one = 2 * hidden**2 + 2 * hidden * groups * size + 3 * hidden * inner + 2 * hidden
    linear = {"q_proj": layers * 2 * hidden, "down_proj": layers * (hidden + inner)}
    return Shape(
        parameters=layers * one + vocabulary * hidden, largest_layer=one, layers=layers,
        hidden=hidden, attention=hidden, key_value=groups * size, intermediate=inner,
        vocabulary=vocabulary, linear=linear, in_linear=in_linear,
    )  # fmt: skip


def models(device="cpu", **sizes):
    policy = shape(**sizes)
    return Models(
        policy=policy, reference=policy, rewards=[policy], prompt_tokens=100,
        process=400_000_000, device=device,
    )  # fmt: skip


def config(*overrides):
    return config_file.load(starter.FOLDER / "demo.yaml", overrides)


def test_engines_of_this_machine_are_beside_the_ranks_and_share_what_is_handed_over():
    keys = ("rollout.engine=vllm", "rollout.cache_gb=1", "rollout.batch_size=64")
    single = config(*keys)
    parts = engine_memory(single, models("cpu"))
    each = sum(parts.values()) - parts["handover"]
    assert beside_ranks(single, models("cpu")) == each + parts["handover"]
    several = config(*keys, "rollout.engines=3", "rollout.joined=1", "rollout.rendezvous=a:1")
    shares = engine_memory(several, models("cpu"))
    assert shares["weights"] == parts["weights"]
    assert shares["cache"] <= parts["cache"]  # of a third of the responses
    here = 2 * (sum(shares.values()) - shares["handover"]) + shares["handover"]
    assert beside_ranks(several, models("cpu")) == here


def one(*overrides, device="cpu", layout=None, **sizes):
    return estimate(config(*overrides), models(device, **sizes), layout or Layout())


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_fsdp_divides_weights_gradients_and_moments_by_the_number_of_ranks(ranks):
    whole, shared = one(), one(layout=Layout(strategy="fsdp", ranks=ranks))
    for part in WEIGHTS:
        assert shared.parts[part] == whole.parts[part] // ranks, part


def test_ddp_divides_no_weights_but_the_batch():
    whole, shared = one(), one(layout=Layout(strategy="ddp", ranks=2))
    for part in WEIGHTS:
        assert shared.parts[part] == whole.parts[part]
    assert shared.parts["KV cache"] == whole.parts["KV cache"] / 2


def test_fsdp_gathers_every_weight_once_in_the_compute_dtype_for_a_rollout():
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        found = one(f"model.dtype={dtype}", layout=Layout(strategy="fsdp", ranks=4))
        assert found.phases["generate"]["gathered"] == width * shape().parameters


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("ppo.micro_batch_size=2", "ppo.micro_batch_size=16"),
        ("rollout.max_new_tokens=16", "rollout.max_new_tokens=256"),
        ("model.value=shared", "model.value=separate"),
        ("ppo.advantage=reward", "model.value=separate"),
        ("model.dtype=bfloat16", "model.dtype=float32"),
    ],
)
def test_a_setting_that_takes_more_memory_has_a_larger_estimate(less, more):
    for layout in layouts(config(), 2):
        assert one(less, layout=layout).peak < one(more, layout=layout).peak


def test_scoring_has_a_mask_only_if_the_reward_model_reads_padding():
    reads = models()
    (reward,) = reads.rewards
    ignores = msgspec.structs.replace(
        reads, rewards=[msgspec.structs.replace(reward, ignores_padding=True)]
    )
    found = [
        estimate(config(), m, Layout()).phases["score"]["activations"] for m in (reads, ignores)
    ]
    length = min(config().reward.max_tokens, 100 + config().rollout.max_new_tokens)
    rows = min(config().reward.batch_size, config().rollout.batch_size)
    assert found[0] - found[1] == rows * length**2 * (1 + 4)


def test_on_a_cpu_frozen_models_take_memory_only_while_they_are_read():
    phases = one(layout=Layout()).phases
    assert [name for name, parts in phases.items() if "reward" in parts] == ["load", "score"]
    assert [name for name, parts in phases.items() if "reference" in parts] == ["reference"]
    assert phases["score"]["reward"] == 2 * one("reward.dtype=bfloat16").phases["score"]["reward"]


@settings(max_examples=50, deadline=None)
@given(
    layers=st.integers(1, 60),
    vocabulary=st.integers(100, 200_000),
    rows=st.sampled_from([4, 32, 256]),
    tokens=st.integers(1, 500),
)
def test_no_phase_shrinks_when_a_size_grows(layers, vocabulary, rows, tokens):
    def totals(layers, vocabulary, rows, tokens):
        keys = f"rollout.batch_size={rows}", f"rollout.max_new_tokens={tokens}"
        return one(*keys, layers=layers, vocabulary=vocabulary).totals

    before = totals(layers, vocabulary, rows, tokens)
    for after in (
        totals(layers + 1, vocabulary, rows, tokens),
        totals(layers, vocabulary + 100, rows, tokens),
        totals(layers, vocabulary, 2 * rows, tokens),
        totals(layers, vocabulary, rows, tokens + 1),
    ):
        assert all(after[phase] >= before[phase] for phase in before)


def test_lora_needs_no_second_reference_and_moments_for_its_adapters_only():
    plain, adapted = one(), one(layout=Layout(lora_rank=16))
    sizes = shape()
    head = sizes.hidden + 1
    assert adapted.parts["optimiser"] == 8 * (16 * sum(sizes.linear.values()) + head)
    assert adapted.parts["optimiser"] < plain.parts["optimiser"] / 10
    assert adapted.parts["reference"] == 0
    again = one("model.reference=starter:policy", layout=Layout(lora_rank=16))
    assert again.parts["reference"] == 0
    named = one("model.reference=another/model", layout=Layout(lora_rank=16))
    assert named.parts["reference"] == plain.parts["reference"]


def test_moments_in_8_bits_take_about_a_quarter_and_nothing_else_changes():
    plain, eight = one(), one("train.optimiser=adamw_8bit")
    assert eight.parts["optimiser"] == pytest.approx(2.1 / 8 * plain.parts["optimiser"])
    assert eight.parts | {"optimiser": 0} == plain.parts | {"optimiser": 0}


def test_frozen_weights_in_4_bits_are_those_of_the_linear_layers():
    given = msgspec.structs.replace(models(), policy=shape(in_linear=1_000_000))
    lora = ("lora.rank=16", "model.dtype=bfloat16")
    plain = estimate(config(*lora), given, Layout(lora_rank=16))
    packed = estimate(config(*lora, "lora.quantise=nf4"), given, Layout(lora_rank=16))
    saved = plain.parts["policy"] - packed.parts["policy"]
    assert saved == pytest.approx(1_000_000 * (2 - 0.5625))


def activations(micro_batch, *overrides, **options):
    found = one(f"ppo.micro_batch_size={micro_batch}", *overrides, **options)
    return found.phases["optimise"]["activations"]


def test_gradients_take_the_place_of_activations_in_a_minibatch_of_one_pass():
    minibatch = config().rollout.batch_size // config().ppo.minibatches
    layers_and_value_head = 4 * (shape().parameters - 49152 * 576 + 577)
    in_two = activations(minibatch // 2)
    assert activations(minibatch) == 2 * in_two - min(2 * in_two, layers_and_value_head)
    for overrides, options in (
        (["model.value=separate"], {}),  # its own pass comes second
        ([], {"layout": Layout(lora_rank=8)}),
        ([], {"layout": Layout(strategy="ddp", ranks=2)}),
        ([], {"device": "cuda"}),
    ):
        rows = minibatch // options.get("layout", Layout()).ranks
        both = [activations(rows // n, *overrides, **options) for n in (1, 2)]
        assert both[0] == 2 * both[1]


def test_activations_on_the_host_are_the_inputs_of_the_layers():
    keys = ("parallel.activation_checkpointing=true", "parallel.activations=offload")
    kept, moved = (
        one(*k, device="cuda").phases["optimise"]["activations"] for k in (keys[:1], keys)
    )
    tokens = config().ppo.micro_batch_size * (100 + config().rollout.max_new_tokens - 1)
    assert kept - moved == shape().layers * tokens * 4 * shape().hidden
    assert one(*keys).peak == one(*keys[:1]).peak  # on a CPU nothing is moved


def test_gaps_in_the_heap_grow_with_small_tensors_and_are_none_on_a_gpu():
    assert int(MALLOC_SETTINGS["MALLOC_MMAP_THRESHOLD_"]) == SMALL_BLOCK

    def gaps(rows):
        keys = (f"rollout.batch_size={4 * rows}", f"ppo.micro_batch_size={rows}")
        found = one(*keys, "ppo.minibatches=2", vocabulary=4096).phases["optimise"]
        return found["heap"] / found["activations"]

    tokens = 100 + config().rollout.max_new_tokens - 1
    most = SMALL_BLOCK // (4 * 576 * tokens)
    assert gaps(2) == pytest.approx(gaps(most // 2)) == pytest.approx(0.4)
    assert 0 < gaps(most) < gaps(most // 2)
    assert gaps(2 * most) == 0
    assert one(device="cuda").phases["optimise"]["heap"] == 0


def test_the_peak_is_that_of_one_phase_and_below_the_sum_of_the_parts():
    for layout in layouts(config(), 2):
        found = one(layout=layout)
        assert found.peak == found.totals[found.fullest]
        assert found.peak < sum(found.parts.values())


def test_on_a_gpu_the_metric_leaves_out_what_torch_does_not_allocate():
    found = one(device="cuda")
    assert found.metric == found.peak - found.parts["CUDA context"] > 0
    assert "process" not in found.parts
    assert one().metric == one().peak


def test_bfloat16_needs_copies_of_the_weights_unless_fsdp_gathers_in_bfloat16():
    bfloat16 = "model.dtype=bfloat16"
    assert one().parts["casts"] == 0
    assert one(bfloat16).parts["casts"] == 2 * shape().parameters
    assert one(bfloat16, layout=Layout(strategy="fsdp", ranks=2)).parts["casts"] == 0


def test_float32_logits_widen_an_output_layer_in_bfloat16_and_need_no_copy_of_one_in_float32():
    layer = shape().vocabulary * shape().hidden
    plain = ("model.dtype=bfloat16",)
    wide = (*plain, "model.float32_logits=true")
    assert one(*plain).parts["casts"] - one(*wide).parts["casts"] == 2 * layer
    assert one(*wide, layout=Layout(strategy="fsdp", ranks=2)).parts["casts"] == 4 * layer
    adapters = one(*wide, "lora.rank=8", layout=Layout(lora_rank=8))
    assert adapters.phases["optimise"]["casts"] == 4 * layer
    large = shape(vocabulary=100 * shape().vocabulary)  # more than the policy's copies
    found = msgspec.structs.replace(models(), reference=large)
    reference = estimate(config(*wide), found, Layout()).phases["reference"]["casts"]
    assert reference == 4 * large.vocabulary * large.hidden


def test_the_configured_layout_follows_the_strategy_and_the_number_of_ranks():
    fsdp = config("parallel.strategy=fsdp")
    assert configured(fsdp, 1).strategy == "one"
    assert configured(fsdp, 4) == Layout(strategy="fsdp", ranks=4)
    assert configured(config(), 4).strategy == "ddp"


def room(gigabytes, device="cpu", gpus=0, nodes=1):
    size = int(gigabytes * 1e9)
    return Capacity(device=device, total=size, free=size, gpus=gpus, nodes=nodes)


def test_a_run_shards_by_itself_only_if_it_would_not_fit_otherwise():
    def strategy(gigabytes, *overrides, ranks=2):
        given = config(*overrides)
        capacity = supposed_gpus(ranks, gigabytes)
        return layout_at_start(given, models("cuda"), ranks, capacity).strategy

    need = one(device="cuda", layout=Layout(strategy="ddp", ranks=2)).peak / 1e9
    assert strategy(2 * need) == "ddp"
    assert strategy(need) == "fsdp"
    assert strategy(need, "parallel.strategy=ddp") == "ddp"
    assert strategy(2 * need, "parallel.strategy=fsdp") == "fsdp"
    assert strategy(need, ranks=1) == "one"
    assert strategy(0.01, "lora={rank: 4, dora: true}") == "ddp"
    assert strategy(0.01, "lora={rank: 4}") == "fsdp"


def test_ranks_share_the_host_and_have_a_gpu_each():
    two = one(layout=Layout(strategy="ddp", ranks=2))
    assert not fits(two, room(two.peak * 1.5 / 1e9))
    assert fits(two, room(two.peak * 2.5 / 1e9))
    found = one(device="cuda", layout=Layout(strategy="ddp", ranks=2))
    for gpus in (1, 2):
        assert fits(found, room(found.peak * 1.2 / 1e9, "cuda", gpus=gpus))
        assert can_start(found.layout, room(80, "cuda", gpus=gpus)) == (gpus == 2)


def test_ranks_of_several_machines_share_the_memory_of_their_own():
    three = one(layout=Layout(strategy="ddp", ranks=3))
    for nodes, together in ((1, 3), (2, 2), (3, 1)):
        assert fits(three, room(three.peak * (together + 0.5) / 1e9, nodes=nodes))
        assert not fits(three, room(three.peak * (together - 0.5) / 1e9, nodes=nodes))
    four = Layout(strategy="fsdp", ranks=4)
    assert can_start(four, room(80, "cuda", gpus=2, nodes=2))
    assert not can_start(four, room(80, "cuda", gpus=2))


def test_the_advice_fits_and_is_a_configuration():
    given, sizes = config("ppo.micro_batch_size=32", "rollout.max_new_tokens=256"), models()
    full = estimate(given, sizes, Layout())
    for share in (0.9, 0.6, 0.4):
        free = room(full.peak * share / 1e9)
        changes, found = changes_to_fit(given, sizes, Layout(), free)
        assert changes
        assert fits(found, free), share
        plain = [c for c in changes if not c.startswith("lora.")]
        lora = 16 if len(plain) < len(changes) else None
        merged = config_file.override(given, plain)
        assert estimate(merged, sizes, Layout(lora_rank=lora)).peak == found.peak


@pytest.mark.parametrize(
    "keys",
    [
        ("model.value=separate", "ppo.value_init=reward_model"),
        ("kl.reference_update={every: 5}",),
    ],
)
def test_the_advice_contradicts_no_other_key(keys):
    given = config(*keys)
    changes, _ = changes_to_fit(given, models("cuda"), Layout(), room(0.1, "cuda", gpus=1))
    assert changes
    config_file.override(given, changes)


def test_a_run_that_fits_gets_no_advice_and_no_warning():
    given, sizes = config(), models()
    assert changes_to_fit(given, sizes, Layout(), room(100))[0] == []
    assert shortage(given, sizes, Layout(), room(100)) is None


def test_the_room_for_a_micro_batch_on_a_gpu_is_used_up_to_the_minibatch():
    given, sizes = config("rollout.batch_size=96", "ppo.micro_batch_size=8"), models("cuda")
    rows = 96 // given.ppo.minibatches

    def largest(gigabytes, device="cuda"):
        return room_for_micro_batch(given, sizes, Layout(), room(gigabytes, device, gpus=1))

    def needed(size):
        changed = config("rollout.batch_size=96", f"ppo.micro_batch_size={size}")
        return 1.2 * estimate(changed, sizes, Layout()).peak / 1e9

    assert largest(1000) == rows
    assert largest(needed(16)) == 16
    assert largest(needed(8)) is None
    assert largest(1000, "cpu") is None


def test_a_shortage_names_settings_that_help_or_the_planner():
    given, sizes = config(), models()
    needs = estimate(given, sizes, Layout()).peak / 1e9
    text = shortage(given, sizes, Layout(), room(needs * 0.9))
    assert f"{needs:.2f} GB" in text
    assert "ppo.micro_batch_size=" in text
    assert "rlhf-tui plan" in shortage(given, sizes, Layout(), room(0.1))


def test_the_free_memory_of_the_host_is_at_most_its_total():
    host = of_host()
    assert 0 < host.free <= host.total


def test_models_survive_a_round_trip_through_json():
    assert msgspec.json.decode(msgspec.json.encode(models()), type=Models) == models()
