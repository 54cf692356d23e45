"""vLLM generates what the policy would, with weights that are checked on every update."""

import json

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import starter
from engine.protocol.rollout.messages import EngineFailed, Generate, LoadWeights
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.native.backend import generate
from engine.train.rollout.stop_criteria import StopCriteria
from tests.train.weights_file import write_weights

POLICY = starter.FOLDER / "policy"
ROWS, LIMIT = 64, 32


torch.set_num_threads(1)  # models this small gain nothing from more


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    lines = (starter.FOLDER / "prompts.jsonl").read_text().splitlines()[:ROWS]
    return [
        Prompt(tokenizer(t)["input_ids"], t, {}) for t in (json.loads(x)["prompt"] for x in lines)
    ]


@pytest.fixture(scope="module")
def engine(start_engine):
    return start_engine()


def changed_model(seed, size=0.02):
    """The starter's policy, with every weight moved a little."""
    lm = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return LanguageModel(lm.eval()).eval()


def update(engine, model, version):
    path = engine.shared.path / "weights.safetensors"
    tensors, sums = write_weights(model.lm, torch.float32, path)
    return LoadWeights(weights_version=version, path=str(path), tensors=tensors, checksum=sums)


def request(prompts, uniforms, tokenizer, version, temperature=1.0):
    return Generate(
        weights_version=version, prompts=[p.ids for p in prompts],
        limits=[uniforms.shape[1]] * len(prompts),
        uniforms=uniforms.numpy().tobytes(), max_new_tokens=uniforms.shape[1],
        temperature=temperature, sampling="gumbel", eos=[tokenizer.eos_token_id], look=False,
    )  # fmt: skip


def native(model, prompts, uniforms, tokenizer, temperature=1.0, limits=None):
    criteria = StopCriteria([tokenizer.eos_token_id], [], tokenizer)
    return generate(
        model, batch_prompts(prompts, 1, 0), uniforms, temperature, criteria, tokenizer,
        limits=limits,
    )  # fmt: skip


def table(data, kind, rollout):
    rows, width = rollout.ids.shape
    return torch.frombuffer(bytearray(data), dtype=kind).view(rows, -1)[:, :width]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-6])
def test_responses_are_those_of_native_rollouts_token_for_token(
    engine, prompts, tokenizer, temperature
):
    version = int(temperature * 10)
    model = changed_model(version)
    loaded = engine.ask(update(engine, model, version))
    assert loaded.checksum == update(engine, model, version).checksum
    uniforms = sampling_uniforms(0, version, ROWS, LIMIT)
    ours = engine.ask(request(prompts, uniforms, tokenizer, version, temperature))
    theirs = native(model, prompts, uniforms, tokenizer, temperature)
    assert ours.weights_version == version
    assert ours.lengths == theirs.lengths.tolist()
    assert torch.equal(table(ours.ids, torch.int32, theirs).long(), theirs.ids)
    logprobs = table(ours.logprobs, torch.float32, theirs)
    if temperature > 0.1:  # near 0 a log-probability is the difference of logits times a million
        assert torch.allclose(logprobs, theirs.logprobs, atol=1e-4)
        entropies = table(ours.entropies, torch.float32, theirs)
        assert torch.allclose(entropies, theirs.entropies, atol=1e-3)


def test_what_is_cached_of_a_prompt_does_not_outlive_the_weights(engine, prompts, tokenizer):
    long = [Prompt([i for p in prompts for i in p.ids][:120], "", {})]
    uniforms = sampling_uniforms(0, 50, 1, 8)
    for version, size in ((50, 0.0), (51, 0.3)):
        model = changed_model(9, size)
        engine.ask(update(engine, model, version))
        ours = engine.ask(request(long, uniforms, tokenizer, version))
        theirs = native(model, long, uniforms, tokenizer)
        logprobs = table(ours.logprobs, torch.float32, theirs)
        assert torch.allclose(logprobs * theirs.mask, theirs.logprobs * theirs.mask, atol=1e-3)


def test_a_later_turn_reads_what_precedes_it_from_the_cache(engine, prompts, tokenizer):
    model = changed_model(6)
    engine.ask(update(engine, model, 55))
    words = [i for p in prompts for i in p.ids]
    prompts = [Prompt((words[k:] * 9)[:140], "", {}) for k in range(ROWS)]  # a block is cached
    first = engine.ask(request(prompts, sampling_uniforms(0, 55, ROWS, LIMIT), tokenizer, 55))
    ids = torch.frombuffer(bytearray(first.ids), dtype=torch.int32).view(ROWS, -1).tolist()
    reply = tokenizer(" What about the music, and what about the actors?")["input_ids"]
    continued = [
        Prompt(p.ids + row[:n] + reply, "", {})
        for p, row, n in zip(prompts, ids, first.lengths, strict=True)
    ][1::2]  # fewer of them go on
    limits = [1 + 5 * i % LIMIT for i in range(len(continued))]
    uniforms = sampling_uniforms(1, 55, len(continued), LIMIT)
    ours = engine.ask(
        msgspec.structs.replace(
            request(continued, uniforms, tokenizer, 55), limits=limits, later_turn=True
        )
    )
    theirs = native(model, continued, uniforms, tokenizer, limits=torch.tensor(limits))
    assert ours.lengths == theirs.lengths.tolist()
    assert torch.equal(table(ours.ids, torch.int32, theirs).long(), theirs.ids)
    logprobs = table(ours.logprobs, torch.float32, theirs)
    assert torch.allclose(logprobs, theirs.logprobs, atol=1e-4)


def test_the_same_request_has_the_same_bits_again(engine, prompts, tokenizer):
    engine.ask(update(engine, changed_model(3), 60))
    asked = request(prompts, sampling_uniforms(0, 60, ROWS, LIMIT), tokenizer, 60)
    one, two = engine.ask(asked), engine.ask(asked)
    assert (one.ids, one.logprobs, one.entropies) == (two.ids, two.logprobs, two.entropies)


def test_a_row_that_the_client_stops_ends_early_and_the_others_do_not(engine, prompts, tokenizer):
    engine.ask(update(engine, changed_model(4), 70))
    uniforms = sampling_uniforms(0, 70, ROWS, LIMIT)
    whole = engine.ask(request(prompts, uniforms, tokenizer, 70))
    asked = msgspec.structs.replace(request(prompts, uniforms, tokenizer, 70), look=True)
    longest = whole.lengths.index(max(whole.lengths))
    looks = []

    def stop_longest(progress):
        looks.append(progress.tokens)
        return [longest] if longest in progress.tokens else []

    stopped = engine.ask(asked, stop_longest)
    expected = [min(n, 8) if i == longest else n for i, n in enumerate(whole.lengths)]
    assert max(whole.lengths) > 8
    assert stopped.lengths == expected
    ids = torch.frombuffer(bytearray(whole.ids), dtype=torch.int32).view(ROWS, -1)
    assert looks[0][longest] == ids[longest, :8].tolist()


def incomplete(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def half_way(weights):
    """Ends in the middle of the model, with layers that are replaced and layers that are not."""
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)


def other_bits(weights):
    weights["model.norm.weight"][0] += 1


@pytest.mark.parametrize("damage", [incomplete, half_way, other_bits])
def test_an_engine_that_got_a_wrong_update_says_so_and_is_gone(start_engine, damage):
    engine = start_engine()
    message = update(engine, changed_model(1), 1)
    weights = load_file(message.path)
    damage(weights)
    announced = message.tensors
    if damage is not other_bits:  # as if the sender itself had left it out, or mistaken its shape
        announced = [
            type(t)(t.name, list(weights[t.name].shape), t.dtype, t.tied)
            for t in message.tensors
            if t.name in weights
        ]
    save_file(weights, message.path)
    reply = engine.ask(
        LoadWeights(
            weights_version=1, path=message.path, tensors=announced, checksum=message.checksum
        )
    )
    assert isinstance(reply, EngineFailed)
    assert engine.process.wait(60) == 3
