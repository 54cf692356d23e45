"""A model and data so small that a step is launches and little else."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from engine import starter


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a model of two layers with the starter's tokenizer."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def few_prompts(tmp_path_factory):
    """A file of prompts of different lengths."""
    texts = [
        "the film",
        "one of the best films that I",
        "a story",
        "I saw this",
        "well, it was",
        "no",
    ]
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path
