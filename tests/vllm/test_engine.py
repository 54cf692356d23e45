"""vLLM generates what the policy would, with weights that are checked on every update."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import starter
from engine.protocol.rollout.messages import EngineFailed, Generate, LoadWeights, NextTurn
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.native.backend import generate
from engine.train.rollout.request import RolloutRequest
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


class Asked:
    """What the engine has generated, padded like a rollout."""

    def __init__(self, engine, prompts, uniforms, tokenizer, version, *, temperature=1.0,
                 limits=None, look=None, **options) -> None:  # fmt: skip
        limits = limits or [uniforms.shape[1]] * len(prompts)
        request = Generate(
            weights_version=version, at_once=len(prompts), at_most=len(prompts),
            max_new_tokens=uniforms.shape[1], temperature=temperature, sampling="gumbel",
            eos=[tokenizer.eos_token_id], look=look is not None, **options,
        )  # fmt: skip
        turns = [
            NextTurn(row, prompt.ids, uniforms[row, :most].numpy().tobytes())
            for row, (prompt, most) in enumerate(zip(prompts, limits, strict=True))
        ]
        self.turns = engine.generate(request, turns, look or (lambda _progress: []))
        self.lengths = [len(turn.ids) for turn in self.turns]
        self.ids = padded([torch.tensor(turn.ids) for turn in self.turns])
        self.logprobs, self.entropies = (
            padded([torch.frombuffer(bytearray(x), dtype=torch.float32) for x in arrays])
            for arrays in zip(
                *((turn.logprobs, turn.entropies) for turn in self.turns), strict=True
            )
        )


def floats(rows):
    return padded([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows])


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def native(model, prompts, uniforms, tokenizer, temperature=1.0, limits=None):
    criteria = StopCriteria([tokenizer.eos_token_id], [], tokenizer)
    asked = RolloutRequest(batch_prompts(prompts, 1, 0), uniforms, temperature, limits=limits)
    return generate(model, asked, criteria, tokenizer)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-6])
def test_responses_are_those_of_native_rollouts_token_for_token(
    engine, prompts, tokenizer, temperature
):
    version = int(temperature * 10)
    model = changed_model(version)
    loaded = engine.ask(update(engine, model, version))
    assert loaded.checksum == update(engine, model, version).checksum
    uniforms = sampling_uniforms(0, version, ROWS, LIMIT)
    ours = Asked(engine, prompts, uniforms, tokenizer, version, temperature=temperature)
    theirs = native(model, prompts, uniforms, tokenizer, temperature)
    assert ours.lengths == theirs.lengths.tolist()
    assert torch.equal(ours.ids, theirs.ids)
    if temperature > 0.1:  # near 0 a log-probability is the difference of logits times a million
        assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        assert torch.allclose(ours.entropies, theirs.entropies, atol=1e-3)


def test_what_is_cached_of_a_prompt_does_not_outlive_the_weights(engine, prompts, tokenizer):
    long = [Prompt([i for p in prompts for i in p.ids][:120], "", {})]
    uniforms = sampling_uniforms(0, 50, 1, 8)
    for version, size in ((50, 0.0), (51, 0.3)):
        model = changed_model(9, size)
        engine.ask(update(engine, model, version))
        ours = Asked(engine, long, uniforms, tokenizer, version)
        theirs = native(model, long, uniforms, tokenizer)
        assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-3)


def test_a_later_turn_reads_what_precedes_it_from_the_cache(engine, prompts, tokenizer):
    model = changed_model(6)
    engine.ask(update(engine, model, 55))
    words = [i for p in prompts for i in p.ids]
    prompts = [Prompt((words[k:] * 9)[:140], "", {}) for k in range(ROWS)]  # a block is cached
    first = Asked(engine, prompts, sampling_uniforms(0, 55, ROWS, LIMIT), tokenizer, 55)
    reply = tokenizer(" What about the music, and what about the actors?")["input_ids"]
    continued = [
        Prompt(p.ids + turn.ids + reply, "", {})
        for p, turn in zip(prompts, first.turns, strict=True)
    ][1::2]  # fewer of them go on
    limits = [1 + 5 * i % LIMIT for i in range(len(continued))]
    uniforms = sampling_uniforms(1, 55, len(continued), LIMIT)
    ours = Asked(
        engine, continued, uniforms, tokenizer, 55, limits=limits, later_turn=True
    )  # fmt: skip
    theirs = native(model, continued, uniforms, tokenizer, limits=torch.tensor(limits))
    assert ours.lengths == theirs.lengths.tolist()
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_the_same_request_has_the_same_bits_again(engine, prompts, tokenizer):
    engine.ask(update(engine, changed_model(3), 60))
    uniforms = sampling_uniforms(0, 60, ROWS, LIMIT)
    one, two = (Asked(engine, prompts, uniforms, tokenizer, 60) for _ in range(2))
    assert one.turns == two.turns


def test_a_row_that_the_client_stops_ends_early_and_the_others_do_not(engine, prompts, tokenizer):
    engine.ask(update(engine, changed_model(4), 70))
    uniforms = sampling_uniforms(0, 70, ROWS, LIMIT)
    whole = Asked(engine, prompts, uniforms, tokenizer, 70)
    longest = whole.lengths.index(max(whole.lengths))
    looks = []

    def stop_longest(progress):
        looks.append(progress.tokens)
        return [longest] if longest in progress.tokens else []

    stopped = Asked(engine, prompts, uniforms, tokenizer, 70, look=stop_longest)
    expected = [min(n, 8) if i == longest else n for i, n in enumerate(whole.lengths)]
    assert max(whole.lengths) > 8
    assert stopped.lengths == expected
    assert looks[1][longest] == whole.turns[longest].ids[:8]


@pytest.mark.parametrize("more_turns", [False, True])
def test_turns_are_sent_while_others_are_generated(engine, prompts, tokenizer, more_turns):
    engine.ask(update(engine, changed_model(5), 80))
    uniforms = sampling_uniforms(0, 80, ROWS, LIMIT)
    limits = [1 + row % LIMIT for row in range(ROWS)]
    sent = []

    def note(progress):
        if progress.ended:
            sent.append({len(turn.ids) for turn in progress.ended})
        return []

    Asked(engine, prompts, uniforms, tokenizer, 80, limits=limits, look=note,
          more_turns=more_turns)  # fmt: skip
    if more_turns:  # as soon as they have ended; vLLM may begin some prompts a step later
        assert len(sent) > LIMIT // 2
        assert all(max(lengths) - min(lengths) <= 1 for lengths in sent)
    else:
        assert [{-(-n // 8) for n in lengths} for lengths in sent] == [{1}, {2}, {3}]


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
