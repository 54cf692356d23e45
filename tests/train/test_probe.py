"""Answers to a probe: a prompt of the operator's, by policy and reference."""

import json
from contextlib import nullcontext

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from engine import starter
from engine.errors import CommandRejectedError
from engine.train.reports.probe import answer_probe, probed_prompt
from tests.train.arithmetic import CHAT


def test_a_probe_that_a_reward_function_cannot_score_says_why_it_has_no_score(make_run, tmp_path):
    text = "def by_answer(completions, answer):\n    return [0.0] * len(completions)\n"
    (tmp_path / "needs_a_column.py").write_text(text)
    run, _ = make_run(
        "reward.model=null", "reward.function=needs_a_column:by_answer", f"reward.path={tmp_path}"
    )
    for found in answer_probe(run, "hello there").values():
        assert found["score"] is None
        assert "it takes 'answer', which is not one of prompt" in found["unscored"]
        assert found["response"]
        assert isinstance(found["kl"], float)


def test_a_probe_with_a_prompt_of_the_data_has_its_other_columns(make_run, tmp_path, write_prompts):
    text = "def by_answer(completions, answer):\n    return [len(a) for a in answer]\n"
    (tmp_path / "has_its_column.py").write_text(text)
    prompts = "".join(
        json.dumps({"prompt": f"hello {i}", "answer": "x" * i}) + "\n" for i in range(8)
    )
    run, _ = make_run(
        "reward.model=null", "reward.function=has_its_column:by_answer",
        f"reward.path={tmp_path}", f"data.prompts={write_prompts('p.jsonl', prompts)}",
    )  # fmt: skip
    for prompt in run.prompts.for_step(1):
        assert set(answer_probe(run, prompt.text)) == {"policy", "reference"}


@pytest.mark.parametrize("tokens", [54, 55])
def test_a_probe_is_rejected_that_has_too_many_tokens_for_the_positions_of_the_model(
    make_run, tmp_path, tokens
):
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    for part in (GPT2LMHeadModel(shape), tokenizer):
        part.save_pretrained(tmp_path)
    run, _ = make_run(f"model.policy={tmp_path}")
    text = " film" * tokens
    assert len(tokenizer(text)["input_ids"]) == tokens
    rejects = pytest.raises(CommandRejectedError, match="1 to 54 tokens, not 55")
    with rejects if tokens > 54 else nullcontext():
        answer_probe(run, text)


@pytest.mark.parametrize("chat", [True, False])
def test_a_probe_of_a_run_with_conversations_is_a_message(make_run, chat):
    run, _ = make_run(*([f"data.chat_template='{CHAT}'", "data.chat=true"] if chat else []))
    found = probed_prompt(run, "hello there")
    assert found.text == ("<user>hello there<end><assistant>" if chat else "hello there")
    assert found.messages == ([{"role": "user", "content": "hello there"}] if chat else None)
    known = run.prompts.for_step(1)[0]
    for text in {known.text, known.plain}:
        assert probed_prompt(run, text) == known
    rendered = f"{run.tokenizer.bos_token}<user>hello"
    assert probed_prompt(run, rendered).text == rendered


def test_a_probe_with_a_held_out_prompt_has_its_tokens(make_run):
    run, _ = make_run("eval={every: 1, holdout: 4}")
    held_out = run.held_out.prompts[0]
    assert probed_prompt(run, held_out.text) is held_out
