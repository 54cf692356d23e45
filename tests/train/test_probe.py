"""Answers to a probe: a prompt of the operator's, by policy and reference."""

import json
from contextlib import nullcontext

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from engine import starter
from engine.errors import CommandRejectedError
from engine.train.reports.probe import answer_probe


def test_a_probe_that_a_reward_function_cannot_score_is_rejected(make_run, tmp_path, monkeypatch):
    text = "def by_answer(completions, answer):\n    return [0.0] * len(completions)\n"
    (tmp_path / "needs_a_column.py").write_text(text)
    run, _ = make_run(
        "reward.model=null", "reward.function=needs_a_column:by_answer", f"reward.path={tmp_path}"
    )
    with pytest.raises(CommandRejectedError, match=r"cannot be scored.*'answer'"):
        answer_probe(run, "hello there")


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
