"""A reward model is trained on judgements, evaluated on others, and can be used as reward.model."""

import json
from collections import Counter

import pytest
import torch
from msgspec.structs import replace
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, BertTokenizerFast

from engine import starter
from engine.config import file as config_file
from engine.config.sections.reward import RewardConfig, RewardSource
from engine.config.sections.reward_training import RewardTrainingConfig
from engine.errors import RlhfError, UserInputError
from engine.progress import report_nothing
from engine.protocol.programs.reward_training import JudgedText, RewardTrainingRequest
from engine.train.data.load_prompts import load_prompts
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.models.pretrained import load_policy_tokenizer
from engine.train.reward_training.evaluate import calibrate, held_out_agreement
from engine.train.reward_training.fit import best_threshold
from engine.train.reward_training.inputs import judged_inputs
from engine.train.reward_training.split import Judgement, all_judgements, split_judgements
from engine.train.reward_training.train import train_reward
from engine.train.rewards.kinds.model import RewardModel
from engine.train.rewards.source import LoadContext, RewardInputs
from tests.train.repeating import ENVIRONMENT, STOPS, respond
from tests.train.test_rewards import SINGLE_RANK

WORDS = ("warm", "dull", "moving", "long", "fine", "flat", "odd", "kind")


def request(out="", *, prompts=12, count=48, config=None, **changed):
    """Labels by a rule that no reward model knows: a response with "and" is good."""
    config = config or config_file.load(starter.FOLDER / "demo.yaml", ["launch.threads=1"])
    responses = [
        JudgedText(
            session=0, prompt=f"The {WORDS[i % prompts % 8]} film {i % prompts}",
            response=f" was {WORDS[i % 8]}{' and' if i % 3 else ','} {WORDS[i // 8 % 8]} {i}.",
            score=float(i % 5),
        )
        for i in range(count)
    ]  # fmt: skip
    whole = {
        "sessions": ["run"], "configs": [config], "responses": responses,
        "preferences": [(prompts, 0), (prompts + 1, 1)],
        "labels": [(i, bool(i % 3)) for i in range(count)],
        "newest": list(range(count)),
        "base": None, "out": str(out), "command": "rlhf-tui reward train run",
        "settings": RewardTrainingConfig(epochs=3, learning_rate=3e-4),
    }  # fmt: skip
    return RewardTrainingRequest(**(whole | changed))


def train(*args, **options):
    lines = []
    return train_reward(request(*args, **options), lines.append), lines


# -- the split -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_in_two_parts_and_each_has_its_share_of_each_kind(seed):
    given = request(settings=RewardTrainingConfig(seed=seed), prompts=24, count=240)
    split = split_judgements(given)
    parts = (split.train, split.validation, split.test)
    assert split.by == "prompt"
    assert Counter(repr(j) for part in parts for j in part) == Counter(
        map(repr, all_judgements(given))
    )
    prompts = [{given.responses[j.response].prompt for j in part} for part in parts]
    assert not prompts[0] & prompts[1] and not (prompts[0] | prompts[1]) & prompts[2]
    for part, share in zip(parts, (0.65, 0.15, 0.2), strict=True):
        kinds = Counter(j.kind for j in part)
        assert kinds["good"] == pytest.approx(160 * share, abs=16)
        assert kinds["other"] == pytest.approx(80 * share, abs=16)


def test_with_few_prompts_no_response_is_in_two_parts():
    split = split_judgements(request(prompts=1))
    parts = [{i for j in part for i in j.responses}
             for part in (split.train, split.validation, split.test)]  # fmt: skip
    assert split.by == "response"
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]


def test_judgements_that_cannot_be_compared_in_each_part_are_refused():
    labels = [(i, i > 0) for i in range(48)]
    with pytest.raises(UserInputError, match="cannot be divided"):
        split_judgements(request(labels=labels, preferences=[]))


# -- what is measured ------------------------------------------------------------------------------


def test_the_agreement_counts_preferences_and_labels_with_a_score():
    judgements = [Judgement(0, 1), Judgement(2), Judgement(3, good=False), Judgement(4)]
    found = held_out_agreement(judgements, [1.0, 2.0, 5.0, 4.0, None])
    assert (found.judgements, found.agreement) == (3, pytest.approx(2 / 3))
    assert held_out_agreement([Judgement(2)], [1.0, 2.0, 5.0]) is None


def test_a_model_that_states_what_happens_is_calibrated():
    margin = torch.logit(torch.tensor(0.75)).item()
    judgements = [Judgement(2 * i, 2 * i + 1) for i in range(4)]
    scores = [margin, 0.0] * 3 + [0.0, margin]
    found = calibrate(judgements, scores)
    assert (found.stated, found.right) == (pytest.approx(0.75), 0.75)
    entropy = -0.75 * torch.log(torch.tensor(0.75)) - 0.25 * torch.log(torch.tensor(0.25))
    assert found.log_loss == pytest.approx(float(entropy), abs=1e-6)


def test_the_threshold_at_the_start_has_the_lowest_loss():
    scores, good = torch.tensor([0.2, 1.5, 3.0, -1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])

    def loss(threshold):
        return float(binary_cross_entropy_with_logits(scores - threshold, good))

    found = best_threshold(scores, good)
    assert loss(found) <= min(loss(found + by) for by in (-0.01, 0.01))
    assert best_threshold(scores, torch.ones(4)) == pytest.approx(float(scores.mean()))


# -- training --------------------------------------------------------------------------------------


def test_a_trained_model_is_a_folder_that_a_run_scores_with(tmp_path):
    result, lines = train(tmp_path / "out")
    assert (result.device, result.base, result.label) == ("cpu", "starter:reward", None)
    assert result.trained_on + result.validated_on + result.held_out == 50
    assert result.in_force is not None and result.at_start is not None
    assert lines[0].startswith("training starter:reward on cpu")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    modes = {p.suffix: p.stat().st_mode for p in (tmp_path / "out").iterdir()}
    assert modes[".safetensors"] == modes[".md"]  # as the umask says
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for words in ("`run`", "2 preferences, 32 responses labelled good", "before training",
                  "Scores of the newest responses", "rlhf-tui reward train run"):  # fmt: skip
        assert words in card
    kept = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))
    assert kept["new_scale"]["mean"] == pytest.approx(result.new_scale.mean)
    # The scores of a run have the mean and the deviation that the card states.
    given = request()
    inputs = judged_inputs(given, SINGLE_RANK)
    context = LoadContext(RewardConfig(), inputs.vocabularies[0], SINGLE_RANK)
    model = RewardModel(RewardSource(model=str(tmp_path / "out")), context)
    batch = batch_prompts(inputs.prompts, 1, 0)
    scores = model(RewardInputs(batch, inputs.ids, inputs.texts, [True] * 48, 1), report_nothing)
    found = torch.tensor(scores)
    assert float(found.mean()) == pytest.approx(result.new_scale.mean, abs=1e-4)
    assert float(found.std(correction=0)) == pytest.approx(result.new_scale.std, abs=1e-4)
    saved = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    original = json.loads((starter.FOLDER / "reward" / "config.json").read_text(encoding="utf-8"))
    assert saved["pad_token_id"] == original["pad_token_id"]


def test_the_scales_are_compared_on_the_newest_responses_not_on_the_judged_ones(tmp_path):
    # Judged are responses of similar scores, as the queue of the most uncertain ones offers them.
    judged = [replace(r, score=2.0 + 1e-3 * i) for i, r in enumerate(request().responses)]
    newest = [
        replace(r, response=f"{r.response} Then", score=float(i % 5)) for i, r in enumerate(judged)
    ]
    count = len(judged)
    result, _ = train(
        tmp_path / "out", responses=judged + newest, newest=list(range(count, 2 * count))
    )
    assert result.old_scale.std == pytest.approx(2**0.5, rel=0.05)
    assert result.width < 10


def test_a_language_model_gets_a_head_of_one_logit(tmp_path):
    out = tmp_path / "models" / "out"  # with a folder that is not there, either
    result, _ = train(out, base="starter:policy", prompts=1)
    assert result.at_start is None
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    assert len(saved.get("id2label", {0: ""})) == 1


def test_training_that_does_not_help_writes_nothing(tmp_path):
    labels = [(i, not i % 3) for i in range(48)]
    hopeless = RewardTrainingConfig(epochs=1, learning_rate=1e-12)
    with pytest.raises(RlhfError, match=r"did not lower the loss|finite"):
        train(tmp_path / "out", labels=labels, settings=replace(hopeless, learning_rate=10.0))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_fills_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"

    def fill(_line):
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("mine")

    with pytest.raises(RlhfError, match="cannot write"):
        train_reward(request(out), fill)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_policies_of_different_tokenizers_are_refused_where_their_tokens_are_read(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film"]
    config = config_file.load(starter.FOLDER / "demo.yaml", ["launch.threads=1"])
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "config.json").write_text('{"model_type": "bert"}')
    other = replace(config, model=replace(config.model, policy=str(tmp_path / "p")))
    given = request(tmp_path / "out", sessions=["a", "b"], configs=[config, other])
    moved = [replace(given.responses[0], session=1), *given.responses[1:]]
    with pytest.raises(UserInputError, match=r"sessions 'a' and 'b' have different tokenizers"):
        train_reward(replace(given, responses=moved), lambda _line: None)


def test_the_end_of_a_response_is_a_token_unless_it_was_cut_off_or_stopped_by_a_text():
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    config = config_file.load(starter.FOLDER / "demo.yaml", ['rollout.stop=["e!"]'])
    texts = [(" was fine.", True), (" was fine.", False), (" was fine!", True), (" fine!!", True)]
    responses = [
        JudgedText(session=0, prompt="The film", response=text, ended=ended)
        for text, ended in texts
    ]
    inputs = judged_inputs(request(config=config, responses=responses), SINGLE_RANK)
    ends = [ids[-1] == tokenizer.eos_token_id for ids in inputs.ids]
    assert ends == [True, False, False, False]
    assert inputs.prompts[0] == Prompt(tokenizer("The film")["input_ids"], "The film", {})
    assert "1 of 1 prompts are not in its data" in inputs.notes[0]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.mark.parametrize("factory", ["null", "module:Game"])
def test_markup_between_turns_that_were_recorded_as_text_is_missing_and_is_told(factory):
    overrides = [f"data.chat_template='{CHAT}'", "data.chat=true", f"environment.factory={factory}"]
    config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    tokenizer = load_policy_tokenizer(config, starter.resolve("starter:policy"), SINGLE_RANK)
    prompt = load_prompts(config.data, tokenizer, per_step=1, seed=config.seed).for_step(1)[0]
    response = JudgedText(session=0, prompt=prompt.text, response="It is. No And?")
    inputs = judged_inputs(request(config=config, responses=[response]), SINGLE_RANK)
    assert inputs.prompts[0].messages
    assert ["without the chat template's markup" in note for note in inputs.notes] == (
        [True] if factory != "null" else []
    )


def test_a_conversation_with_an_environment_is_read_as_in_a_run(make_run):
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    template = CHAT.replace("{% endfor %}", f"{tokenizer.eos_token}{{% endfor %}}")
    keys = [f"data.chat_template='{template}'", "data.chat=true", STOPS]
    run, _ = make_run(*ENVIRONMENT, *keys, "environment.max_tokens=200")
    rollout = respond(run)
    assert max(turns.count for turns in rollout.conversation.turns) > 1
    responses = [
        JudgedText(
            session=0, prompt=prompt.text, response=text, ended=bool(ended),
            messages=rollout.messages(i),
        )
        for i, (prompt, text, ended) in enumerate(
            zip(rollout.batch.prompts, rollout.texts, rollout.ended, strict=True)
        )
    ]  # fmt: skip
    inputs = judged_inputs(request(config=run.config, responses=responses), SINGLE_RANK)
    in_run = RewardInputs.of(rollout, 1)
    assert inputs.notes == []
    for i, (prompt, expected) in enumerate(zip(rollout.batch.prompts, in_run.ids, strict=True)):
        assert (inputs.prompts[i].ids, inputs.prompts[i].messages) == (prompt.ids, prompt.messages)
        # The policy may have spelled its words with other tokens. For the end, see above.
        texts = [run.tokenizer.decode(ids) for ids in (inputs.ids[i], expected)]
        assert texts[0].removesuffix(tokenizer.eos_token) == texts[1].removesuffix(
            tokenizer.eos_token
        )
        assert inputs.messages[i] == in_run.messages(i)


def test_a_split_that_leaves_nothing_to_train_on_says_what_to_lower():
    given = request(settings=RewardTrainingConfig(holdout=0.5, validation=0.5))
    with pytest.raises(UserInputError, match="lower one"):
        split_judgements(given)
