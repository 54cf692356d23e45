"""Reward models as sources: what they read, and where a score is taken."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from engine import starter
from engine.config.sections.launch import LaunchConfig
from engine.config.sections.reward import RewardConfig
from engine.errors import UserInputError
from engine.progress import report_nothing
from engine.train.data.prompts import batch_prompts
from engine.train.distributed.ranks import RankGroup
from engine.train.rewards.kinds.encoding import EncodedResponses
from engine.train.rewards.mix import load_rewards
from engine.train.rewards.source import LoadContext, RewardInputs

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))


@pytest.fixture
def load(tokenizer):
    """Loads the reward model of a section `reward`, for the policy of that tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return lambda **keys: load_rewards(
        LoadContext(RewardConfig(**keys), vocabulary, SINGLE_RANK)
    ).reward_model()


def test_the_same_tokens_or_the_same_text_give_the_same_score(inputs, load):
    got = load(model="starter:reward")(inputs, report_nothing)
    model = AutoModelForSequenceClassification.from_pretrained(
        starter.resolve("starter:reward"), dtype=torch.float32
    )
    for ids, prompt, score in zip(inputs.ids, inputs.batch.prompts, got, strict=True):
        logits = model(input_ids=torch.tensor([prompt.ids + ids])).logits
        assert score == pytest.approx(float(logits[0, 0]), abs=1e-4)


@pytest.fixture
def foreign_classifier(tmp_path, tokenizer):
    """A classifier of another architecture, whose pad token is its end-of-sequence token."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, num_labels=3,
        pad_token_id=tokenizer.eos_token_id, id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def test_padding_never_hides_the_end_of_a_response(foreign_classifier, inputs, load):
    reward = load(model=foreign_classifier, label="good")
    together = reward(inputs, report_nothing)
    for i in range(3):
        one = RewardInputs(
            batch_prompts([inputs.batch.prompts[i]], 1, 0), [inputs.ids[i]],
            [inputs.texts[i]], [True], 7,
        )  # fmt: skip
        assert together[i] == pytest.approx(reward(one, report_nothing)[0], abs=1e-5)


def test_padding_is_a_token_of_the_model_that_no_response_ends_with():
    encoded = EncodedResponses([[0, 1, 2], [3, 1], [0]], None, None, vocabulary=4)
    assert encoded.pad_of([0, 2]) == 3  # in neither of them
    assert encoded.pad_of([0, 1]) == 0  # all are in them
    with pytest.raises(UserInputError, match=r"none is left to pad .* lower reward\.batch_size"):
        EncodedResponses([[0], [0, 1]], None, None, vocabulary=2).pad_of([0, 1])


@pytest.fixture
def encoder(tmp_path):
    """A BERT classifier with its own tokenizer, which tells a pair's texts apart."""
    torch.manual_seed(0)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "the",
        "film",
        "was",
        "great",
        "bad",
        "and",
        "long",
        "again",
    ]
    own = BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, model_max_length=20)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24, num_labels=1,
    )  # fmt: skip
    model = BertForSequenceClassification(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "bert")
    own.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert"), model, own


@pytest.mark.parametrize("pair", [False, True])
def test_an_encoder_of_another_tokenizer_scores_as_when_it_is_called_by_hand(
    inputs, load, encoder, pair
):
    folder, model, own = encoder
    got = load(model=folder, pair=pair)(inputs, report_nothing)
    assert len({round(score, 3) for score in got}) == 3
    for score, text in zip(got, inputs.texts, strict=True):
        texts = ("The film", text) if pair else ("The film" + text,)
        by_hand = own(*texts, return_tensors="pt")
        assert score == pytest.approx(float(model(**by_hand).logits[0, 0]), abs=1e-5)


@pytest.mark.parametrize("pair", [False, True])
def test_a_rank_without_responses_scores_none(inputs, load, encoder, pair):
    folder, _, _ = encoder
    reward = load(model=folder, pair=pair)
    assert reward(inputs.select(torch.arange(0)), report_nothing) == []


def test_a_value_cannot_be_fitted_to_a_model_that_reads_other_tokens(encoder, load):
    folder, _, _ = encoder
    reward = load(model=folder)
    with pytest.raises(UserInputError, match=r"bert' does not: set model\.value: shared"):
        reward.check_states()


def test_an_encoder_reads_the_end_of_what_is_too_long_and_its_special_tokens(inputs, load, encoder):
    folder, model, own = encoder
    reward = load(model=folder, max_tokens=8)
    (score,) = reward(inputs.select(torch.tensor([1])), report_nothing)
    words = ["[CLS]", "long", "[UNK]", "and", "bad", "again", "[UNK]", "[SEP]"]
    by_hand = torch.tensor([own.convert_tokens_to_ids(words)])
    assert score == pytest.approx(float(model(input_ids=by_hand).logits[0, 0]), abs=1e-5)


def test_of_several_labels_one_must_be_chosen(foreign_classifier, load):
    with pytest.raises(UserInputError, match=r"has 3 labels.*2: good"):
        load(model=foreign_classifier)
    with pytest.raises(UserInputError, match="no label 'nice'"):
        load(model=foreign_classifier, label="nice")


def test_a_folder_without_a_classifier_is_an_error_on_one_line(tmp_path, load):
    with pytest.raises(UserInputError) as caught:
        load(model=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
