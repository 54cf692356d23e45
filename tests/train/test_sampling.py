"""Random streams, sampling, and the log-probabilities of sampled tokens.

The models are tiny Llama and GPT-2 models with random float32 weights.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.data.randomness import derived_seed, permutation, sampling_uniforms
from engine.train.models import cpu_matmul
from engine.train.models.language_model import LanguageModel
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.rollout.native import transposed_weights
from engine.train.rollout.native.backend import generate
from engine.train.rollout.native.schedule import EXACT, Schedule
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import left_mask
from engine.train.rollout.sampling import SCHEMES, block_size, log_uniforms, sample
from engine.train.rollout.stop_criteria import StopCriteria
from tests.variants import some_of

VOCABULARY, LIMIT, EOS = 32, 12, [3, 4, 5, 6]
BELOW_ONE = 1 - 2**-24
ROUNDING = 5e-5
"""Between two ways to compute a float32 log-probability, value or entropy of these models: each is
within 1.2e-5 of float64's, more or less by the processor's instructions. A masked or misplaced
token changes them by a thousand times as much."""
modest = settings(max_examples=60, deadline=None, derandomize=True)


def slow_log_softmax(logits, temperature):
    """In double precision, from float32 logits."""
    scaled = [float(x) / temperature for x in logits]
    top = max(scaled)
    total = math.fsum(math.exp(x - top) for x in scaled)
    return [x - top - math.log(total) for x in scaled]


@st.composite
def rows_of_logits(draw):
    n, v = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    size = draw(st.sampled_from([1, 8, 40]))
    numbers = st.lists(st.integers(-64 * size, 64 * size), min_size=n * v, max_size=n * v)
    temperature = draw(st.sampled_from([0.25, 0.7, 1.0, 3.0]))
    return torch.tensor(draw(numbers)).reshape(n, v) / 64, temperature


@modest
@given(rows_of_logits(), st.lists(st.floats(0, BELOW_ONE, width=32), min_size=4, max_size=4))
def test_the_token_is_the_inverse_of_the_cumulative_distribution(rows, drawn):
    logits, temperature = rows
    uniforms = torch.tensor(drawn, dtype=torch.float64)[: len(logits)]
    tokens, logprobs, entropies = sample(logits, uniforms, temperature, "inverse_cdf")
    for row, u, token, logprob, entropy in zip(
        logits, drawn, tokens.tolist(), logprobs.tolist(), entropies.tolist(), strict=False
    ):
        slow = slow_log_softmax(row, temperature)
        before = math.fsum(math.exp(x) for x in slow[:token])
        # The error of a cumulative sum of 12 float32 probabilities: a few times 12 · 6e-8.
        assert before - 2e-6 <= u <= before + math.exp(slow[token]) + 2e-6
        # Logits are up to 160 after the temperature: their rounding error is 160 · 6e-8.
        assert logprob == pytest.approx(slow[token], abs=5e-5)
        assert entropy == pytest.approx(-math.fsum(math.exp(x) * x for x in slow), abs=1e-4)


def slow_exponentials(uniform, count):
    """SplitMix64 with unsigned integers."""
    drawn = []
    for i in range(count):
        x = (int(uniform * 2**53) + i * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        x ^= x >> 31
        x = (x + 2**63) % 2**64
        drawn.append(-math.log((x // 2**12 + 0.5) / 2**52))
    return drawn


@modest
@given(rows_of_logits(), st.lists(st.integers(0, 2**53 - 1), min_size=4, max_size=4))
def test_the_token_wins_the_race_in_the_block_that_wins_the_race_of_blocks(rows, drawn):
    logits, temperature = rows
    uniforms = torch.tensor([x / 2**53 for x in drawn[: len(logits)]], dtype=torch.float64)
    size = block_size(logits.shape[1])
    tokens, _, _ = sample(logits, uniforms, temperature, "gumbel")
    for row, uniform, token in zip(logits, uniforms.tolist(), tokens.tolist(), strict=True):
        probs = [math.exp(x) for x in slow_log_softmax(row, temperature)]
        blocks = [probs[i : i + size] for i in range(0, len(probs), size)]
        noise = slow_exponentials(uniform, len(blocks) + size)
        times = [math.fsum(b) / noise[i] for i, b in enumerate(blocks)]
        # An earlier start by rounding, a few times 1e-6 of logits up to 160, wins as well.
        assert times[token // size] >= max(times) * (1 - 1e-4)
        times = [p / noise[len(blocks) + i] for i, p in enumerate(blocks[token // size])]
        assert times[token % size] >= max(times) * (1 - 1e-4)


def test_exponential_numbers_are_independent_and_of_mean_and_variance_1():
    drawn = -log_uniforms(sampling_uniforms(0, 1, 40, 50).flatten(), torch.arange(100))
    assert drawn.shape == (2000, 100)
    assert drawn[3, :5].tolist() == pytest.approx(
        slow_exponentials(float(sampling_uniforms(0, 1, 1, 4)[0, 3]), 5), rel=1e-12
    )
    assert float(drawn.mean()) == pytest.approx(1, abs=0.01)  # five standard errors
    assert float(drawn.var()) == pytest.approx(1, abs=0.03)
    correlations = torch.corrcoef(drawn.T) - torch.eye(100)
    assert float(correlations.abs().max()) < 5.5 / 2000**0.5


def test_rounding_changes_ten_times_fewer_tokens_than_with_an_inverse_cdf():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 4096, generator=generator)
    moved = logits + 3e-4 * torch.randn(logits.shape, generator=generator)  # so that some change
    changed = dict.fromkeys(SCHEMES, 0)
    for uniforms in sampling_uniforms(0, 1, 64, 30).T:
        for scheme in SCHEMES:
            tokens, others = (sample(x, uniforms, 1.0, scheme)[0] for x in (logits, moved))
            changed[scheme] += int((tokens != others).sum())
    assert changed["inverse_cdf"] > 20
    assert changed["gumbel"] <= changed["inverse_cdf"] / 10


@pytest.mark.parametrize("scheme", SCHEMES)
@modest
@given(rows_of_logits(), st.data())
def test_a_token_without_probability_is_never_sampled(scheme, rows, data):
    logits, temperature = rows
    v = logits.shape[1]
    banned = torch.tensor(data.draw(st.lists(st.booleans(), min_size=v, max_size=v)))
    assume(not banned.all())
    nothing = data.draw(st.sampled_from([-math.inf, -1e4]))
    logits = logits.masked_fill(banned, nothing)
    for u in (0.0, 1e-30, 0.5, 1 - 2**-23, BELOW_ONE):
        uniforms = torch.full((len(logits),), u, dtype=torch.float64)
        tokens, logprobs, entropies = sample(logits, uniforms, temperature, scheme)
        assert not banned[tokens].any()
        assert logprobs.isfinite().all()
        assert entropies.isfinite().all()


@pytest.mark.parametrize("possible", [1, 2, 1000, 50_000])
def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_possible_token(possible):
    logits = torch.full((2, possible + 2), -math.inf)
    logits[:, 1:-1] = 0.0
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs, entropies = sample(logits, ends, 1.0, "inverse_cdf")
    assert tokens.tolist() == [1, possible]
    assert logprobs.tolist() == pytest.approx([-math.log(possible)] * 2, abs=1e-5)
    assert entropies.tolist() == pytest.approx([math.log(possible)] * 2, abs=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_frequencies_are_those_of_the_softmax(temperature, scheme):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.25])
    uniforms = sampling_uniforms(7, 3, 400, 50).flatten()
    tokens, _, _ = sample(logits.expand(len(uniforms), -1), uniforms, temperature, scheme)
    seen = tokens.bincount(minlength=8).tolist()
    want = [len(uniforms) * math.exp(x) for x in slow_log_softmax(logits, temperature)]
    # Chi-square with 7 degrees of freedom exceeds 29.9 once in ten thousand times.
    assert sum((s - w) ** 2 / w for s, w in zip(seen, want, strict=True)) < 29.9


def test_the_left_mask_is_one_on_prompt_tokens():
    got = left_mask(torch.tensor([1, 4, 2]), 4)
    assert got.dtype is torch.int64
    assert got.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]


def test_the_uniforms_fill_the_unit_interval_evenly():
    u = sampling_uniforms(1, 2, 200, 100)
    assert u.shape == (200, 100)
    assert u.dtype is torch.float64
    assert torch.equal((u * 2**53).frac(), torch.zeros_like(u))
    assert ((u >= 0) & (u < 1)).all()
    for lower in (1, 2**20, 2**24, 2**40):  # bits further down are as even
        counts = ((u * lower).frac().flatten() * 16).long().bincount(minlength=16).double()
        # 15 degrees of freedom: 44.3 once in ten thousand times.
        assert float(((counts - 1250) ** 2 / 1250).sum()) < 44.3


def test_the_first_24_bits_are_what_sessions_of_earlier_versions_drew():
    found = (sampling_uniforms(5, 9, 2, 3) * 2**24).long()
    assert found.tolist() == [[11581156, 5347633, 2935834], [11948258, 13172722, 964677]]


def test_the_uniforms_depend_on_the_seed_and_the_step_alone():
    torch.manual_seed(1)
    first, state = sampling_uniforms(5, 9, 4, 6), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, sampling_uniforms(5, 9, 4, 6))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator is unused
    others = [sampling_uniforms(5, 10, 4, 6), sampling_uniforms(6, 9, 4, 6)]
    assert not any((first == other).any() for other in others)


def test_the_uniform_of_a_samples_token_does_not_depend_on_how_many_samples_there_are():
    whole = sampling_uniforms(5, 9, 33, 12)
    for batch in (1, 2, 5, 32):
        assert torch.equal(whole[:batch], sampling_uniforms(5, 9, batch, 12))


def test_the_uniform_of_a_samples_token_does_not_depend_on_the_limit_of_tokens():
    whole = sampling_uniforms(5, 9, 4, 40)
    for limit in (1, 3, 16, 39):
        assert torch.equal(whole[:, :limit], sampling_uniforms(5, 9, 4, limit))


def test_a_seed_is_derived_from_seed_purpose_and_every_number():
    arguments = [(1, "a"), (1, "a", 2), (2, "a", 1), (1, "b", 2), (1, "a", 2, 3), (1, "a", 23)]
    arguments += [(12, "a", 3), (1, "a1"), (1, "2a"), (1, "a", 0), (1, "a", 0, 0), (1, "a", 3, 2)]
    drawn = [derived_seed(*t) for t in arguments * 2]
    assert drawn[: len(arguments)] == drawn[len(arguments) :]
    assert len(set(drawn)) == len(arguments)


@modest
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 50))
def test_a_permutation_has_every_number_once_and_is_reproducible(seed, number, n):
    got = permutation(seed, "order", (number,), n)
    assert got.dtype is torch.int64
    assert sorted(got.tolist()) == list(range(n))
    assert torch.equal(got, permutation(seed, "order", (number,), n))
    if n >= 20:
        assert not torch.equal(got, permutation(seed, "order", (number + 1,), n))
        assert not torch.equal(got, permutation(seed, "other", (number,), n))
        assert not torch.equal(got, permutation(seed + 1, "order", (number,), n))


def test_another_process_draws_the_same_numbers():
    code = (
        "from engine.train.data.randomness import permutation as p, sampling_uniforms as s;"
        "print(p(3, 'order', (1, 2), 30).tolist(), s(3, 4, 2, 5).tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    ours = permutation(3, "order", (1, 2), 30).tolist(), sampling_uniforms(3, 4, 2, 5).tolist()
    assert run.stdout.strip() == f"{ours[0]} {ours[1]}"


@pytest.fixture(scope="module", params=["relative positions", "absolute positions"])
def model(request):
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "initializer_range": 0.5}
    if request.param == "relative positions":
        config = LlamaConfig(**size, intermediate_size=32)
    else:
        config = GPT2Config(**size, n_positions=32)
    policy = LanguageModel(AutoModelForCausalLM.from_config(config), "shared").eval()
    torch.nn.init.normal_(policy.value_head.weight, std=0.25)
    return policy


@pytest.fixture(scope="module")
def respond(model):
    """Returns a function that generates responses to prompts of different lengths."""
    generator = torch.Generator().manual_seed(4)
    lengths = [1, 9, 4, 4, 7, 2, 3, 8]
    ids = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    prompts = [Prompt(ids=i, text="", row={}) for i in ids]
    uniforms = sampling_uniforms(11, 1, len(prompts), LIMIT)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)))

    def run(
        rows=tuple(range(8)), eos=(), temperature=1.0, drawn=None, stop=(), per_prompt=1,
        limits=None, **named
    ):  # fmt: skip
        batch = batch_prompts([prompts[i] for i in rows], 1, 0)
        request = RolloutRequest(
            batch, uniforms[list(drawn or rows)], temperature, per_prompt, limits
        )  # fmt: skip
        stop_criteria = StopCriteria(list(eos), list(stop), tokenizer)
        with torch.no_grad():
            return generate(model, request, stop_criteria, tokenizer, **named)

    return run


@pytest.mark.parametrize("eos", [[], EOS])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_generation_and_a_full_forward_pass_agree(model, respond, eos, temperature):
    rollout = respond(eos=eos, temperature=temperature)
    assert (len(set(rollout.lengths.tolist())) > 2) == bool(eos)
    with torch.no_grad():
        for size in (1, 3, 8):
            logprobs, values = score_tokens(model, rollout, temperature, MicroBatchLimit(size))
            torch.testing.assert_close(logprobs, rollout.logprobs * rollout.mask, rtol=0, atol=1e-4)
            torch.testing.assert_close(values, rollout.values * rollout.mask, rtol=0, atol=1e-4)


def test_weights_in_transposed_order_change_no_response(monkeypatch, model, respond):
    before, weights = respond(eos=EOS), list(model.parameters())
    monkeypatch.setattr(cpu_matmul, "ONEDNN_IS_QUICKER", True)
    monkeypatch.setattr(transposed_weights, "WORTHWHILE", 1)
    rollout = respond(eos=EOS)
    assert all(same_response(before, i, rollout, i) for i in range(8))
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_generated_tokens_values_and_entropies_are_those_of_one_row_alone(model, respond):
    rollout = respond(eos=EOS, temperature=0.8, sampling="inverse_cdf")
    uniforms = sampling_uniforms(11, 1, 8, LIMIT).tolist()
    for i, prompt in enumerate(rollout.batch.prompts):
        ids = list(prompt.ids)
        for t in range(int(rollout.lengths[i])):
            with torch.no_grad():  # no cache, no padding, no other row
                hidden = model.lm.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
                slow = slow_log_softmax(model.lm.lm_head(hidden), 0.8)
                value = float(model.value_head(hidden))
            sums = itertools.accumulate(math.exp(x) for x in slow)
            token = next(k for k, below in enumerate(sums) if below > uniforms[i][t])
            assert int(rollout.ids[i, t]) == token
            assert float(rollout.logprobs[i, t]) == pytest.approx(slow[token], abs=1e-4)
            assert float(rollout.values[i, t]) == pytest.approx(value, abs=1e-4)
            spread = -math.fsum(math.exp(x) * x for x in slow)
            assert float(rollout.entropies[i, t]) == pytest.approx(spread, abs=1e-4)
            ids.append(token)


def same_response(a, i, b, j):
    n = int(a.lengths[i])
    return a.ids[i, :n].tolist() == b.ids[j, :n].tolist() and all(
        torch.allclose(x[i, :n], y[j, :n], rtol=0, atol=ROUNDING)
        for x, y in ((a.logprobs, b.logprobs), (a.values, b.values), (a.entropies, b.entropies))
    )


def test_finished_rows_that_leave_the_batch_do_not_change_the_others(respond):
    ending, endless = respond(eos=EOS), respond(eos=[])
    assert endless.lengths.tolist() == [LIMIT] * 8
    assert min(ending.lengths.tolist()) < 4
    assert all(same_response(ending, i, endless, i) for i in range(8))


def test_a_response_ends_at_its_first_end_of_sequence_token_or_at_the_limit(respond):
    ending, endless = respond(eos=EOS), respond(eos=[])
    for i, tokens in enumerate(endless.ids.tolist()):
        at = [t for t, token in enumerate(tokens) if token in EOS]
        n = at[0] + 1 if at else LIMIT
        assert int(ending.lengths[i]) == n
        assert bool(ending.eos[i]) == bool(ending.ended[i]) == bool(at)
        assert not ending.ids[i, n:].any()


def test_generation_depends_on_no_other_row_and_no_generator(respond):
    together = respond(eos=EOS)
    for rows in ((0,), (5,), (1, 6), (7, 3, 2), range(8)):
        apart = respond(rows, eos=EOS)
        assert all(same_response(apart, j, together, i) for j, i in enumerate(rows))


def test_processing_a_prompt_once_for_all_its_responses_gives_the_same_responses(respond):
    rows, drawn = (1, 1, 1, 4, 4, 4), range(6)
    apart = respond(rows, EOS, drawn=drawn)
    once = respond(rows, EOS, drawn=drawn, per_prompt=3)
    assert len(set(map(tuple, once.ids.tolist()))) > 2
    assert all(same_response(once, i, apart, i) for i in range(6))


@pytest.mark.parametrize("at_once", some_of({"all": None, "three": 3, "one": 1}, "three"))
@pytest.mark.parametrize("schedule", [EXACT, Schedule(5, fixed_shapes=False), Schedule(5, True)])
@pytest.mark.parametrize("stop", [[], ["w7", "w1 w2"]])
def test_checks_shapes_and_refilled_slots_change_no_response(respond, schedule, at_once, stop):
    rows, drawn = (1, 1, 5, 5, 4, 4, 0, 0), range(8)
    for eos in (EOS, []):
        plain = respond(rows, eos, drawn=drawn, stop=stop)
        other = respond(
            rows, eos, drawn=drawn, stop=stop, per_prompt=2, schedule=schedule, at_once=at_once
        )
        for name in ("ids", "lengths", "eos", "ended"):
            assert torch.equal(getattr(plain, name), getattr(other, name)), name
        for name in ("logprobs", "values", "entropies"):
            torch.testing.assert_close(
                getattr(plain, name), getattr(other, name), rtol=0, atol=ROUNDING
            )
        assert plain.texts == other.texts


@pytest.mark.parametrize("at_once", some_of({"all": None, "three": 3}, "three"))
@pytest.mark.parametrize("schedule", [EXACT, Schedule(5, fixed_shapes=False), Schedule(5, True)])
def test_each_response_is_told_once_it_has_ended(respond, schedule, at_once):
    told, reported = {}, []

    def on_ended(row, ids):
        assert row not in told
        told[row] = ids, len(reported)

    rollout = respond(
        eos=EOS[:2], stop=["w7"], schedule=schedule, at_once=at_once, on_ended=on_ended,
        report=lambda *_: reported.append(None),
    )  # fmt: skip
    lengths = rollout.lengths.tolist()
    assert {row: ids for row, (ids, _) in told.items()} == {
        row: rollout.ids[row, :length].tolist() for row, length in enumerate(lengths)
    }
    assert min(when for _, when in told.values()) < len(reported) - 1  # before the last check


@pytest.mark.parametrize("at_once", some_of({"all": None, "three": 3}, "three"))
@pytest.mark.parametrize("schedule", [EXACT, Schedule(5, fixed_shapes=False), Schedule(5, True)])
def test_each_response_has_a_limit_of_its_own(respond, schedule, at_once):
    limits = [1, 2, 3, LIMIT, 5, 1, 7, 4]
    endless = respond(eos=EOS)
    cut = respond(eos=EOS, schedule=schedule, at_once=at_once, limits=torch.tensor(limits))
    width = cut.ids.shape[1]
    for i, limit in enumerate(limits):
        length = min(limit, int(endless.lengths[i]))
        assert int(cut.lengths[i]) == length
        assert cut.ids[i].tolist() == (endless.ids[i, :length].tolist() + [0] * width)[:width]
        assert bool(cut.ended[i]) == (length == int(endless.lengths[i]) and bool(endless.ended[i]))


def test_a_stop_string_ends_a_response_where_its_text_first_has_it(respond):
    endless, stopped = respond(), respond(stop=["w7", "w1 w2"])
    assert stopped.ended.any()
    for i, tokens in enumerate(endless.ids.tolist()):
        texts = [" ".join(f"w{t}" for t in tokens[:n]) for n in range(1, LIMIT + 1)]
        found = [n for n, text in enumerate(texts, 1) if "w7" in text or "w1 w2" in text]
        length = found[0] if found else LIMIT
        assert (
            stopped.ids[i].tolist()[:LIMIT]
            == (tokens[:length] + [0] * LIMIT)[: stopped.ids.shape[1]]
        )
        assert int(stopped.lengths[i]) == length
        assert bool(stopped.ended[i]) == bool(found)


def test_responses_that_wait_for_a_slot_are_generated_where_others_have_ended(respond):
    seen = []
    respond(eos=EOS, at_once=2, report=lambda *progress: seen.append(progress))
    assert seen[-1][1] == 4 * LIMIT
    assert seen[-1][0] < 3 * LIMIT  # one after the other, four pairs of responses take longer
