"""Reward models on a causal decoder read padded rows without an attention mask."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
)

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.reward import RewardConfig, RewardSource
from engine.progress import report_nothing
from engine.train.distributed.ranks import RankGroup
from engine.train.rewards.kinds.model import RewardModel
from engine.train.rewards.source import LoadContext

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_labels": 1, "initializer_range": 0.3,
}  # fmt: skip
DECODERS = {
    "llama": (LlamaConfig, {}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "bloom": (BloomConfig, {"n_layer": 2, "n_head": 2}),
    "gemma3, sliding window": (
        Gemma3TextConfig,
        {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 4},
    ),
}
READ_BOTH_WAYS = {
    "llama": (LlamaConfig, {"is_causal": False}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 16, "num_key_value_heads": 2, "use_bidirectional_attention": True},
    ),
    "bert": (BertConfig, {}),
}


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes a classifier and loads it as a run does; returns it and the masks that it got."""

    def loaded(kind, settings):
        torch.manual_seed(0)
        config = kind(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SHAPE | settings
        )
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        context = LoadContext(RewardConfig(), tokenizer.get_vocab(), SINGLE_RANK)
        return RewardModel(RewardSource(model=str(tmp_path)), context), model.eval()

    return loaded


@pytest.fixture
def masks(monkeypatch):
    """Collects whether classifiers are called with a mask."""
    given = []
    call = torch.nn.Module.__call__

    def watched(self, *args, **named):
        if type(self).__name__.endswith("ForSequenceClassification"):
            given.append("attention_mask" in named)
        return call(self, *args, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", watched)
    return given


def alone(model, inputs):
    """The score of each row without padding."""
    rows = [p.ids + ids for p, ids in zip(inputs.batch.prompts, inputs.ids, strict=True)]
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_causal_decoder_gets_no_mask_and_scores_rows_as_alone(kind, load, masks, inputs):
    reward, model = load(*DECODERS[kind])
    masks.clear()
    assert reward(inputs, report_nothing) == pytest.approx(alone(model, inputs), abs=1e-5)
    assert masks[0] is False


@pytest.mark.parametrize("kind", READ_BOTH_WAYS)
def test_a_model_that_reads_what_follows_gets_a_mask(kind, load, masks, inputs):
    reward, model = load(*READ_BOTH_WAYS[kind])
    masks.clear()
    assert reward(inputs, report_nothing) == pytest.approx(alone(model, inputs), abs=1e-5)
    assert masks[0] is True
