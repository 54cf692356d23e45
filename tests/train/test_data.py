"""Prompts: file formats, order, and errors."""

import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engine import starter
from engine.config.sections.model import DataConfig
from engine.errors import UserInputError
from engine.train.data import chat_template, tokenise
from engine.train.data.load_prompts import load_prompts
from engine.train.data.prompt_order import Prompts
from engine.train.data.prompt_table import PromptTable
from engine.train.data.prompts import Prompt, batch_prompts


def load(tokenizer, path, **keys):
    return load_prompts(DataConfig(prompts=path, **keys), tokenizer, per_step=2, seed=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"prompt": "The film", "more": 1}\n{"prompt": "This phone", "more": 2}\n'),
        ("p.csv", "prompt,more\nThe film,1\nThis phone,2\n"),
    ],
)
def test_each_text_format_gives_the_same_prompts(tokenizer, write_prompts, name, text):
    prompts = load(tokenizer, write_prompts(name, text), shuffle=False)
    assert [p.text for p in prompts.for_step(1)] == ["The film", "This phone"]
    assert [p.row["more"] for p in prompts.for_step(1)] == [1, 2]


def test_parquet_is_read_too(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "p.parquet"
    datasets.Dataset.from_dict({"prompt": ["The film", "This phone"]}).to_parquet(path)
    assert len(load(tokenizer, str(path))) == 2


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Folders: `files` and `splits` have two splits, `one` is a single one that was saved."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    splits = {"train": ["one two", "three"], "test": ["four"]}
    sets = {k: datasets.Dataset.from_dict({"prompt": texts}) for k, texts in splits.items()}
    (tmp_path / "files").mkdir()
    for name, rows in sets.items():
        rows.to_parquet(tmp_path / "files" / f"{name}-00000-of-00001.parquet")
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "splits")
    sets["train"].save_to_disk(tmp_path / "one")
    return tmp_path


@pytest.mark.parametrize("folder", ["files", "splits", "one"])
def test_a_folder_is_read_like_a_file(tokenizer, saved, folder):
    read = load(tokenizer, str(saved / folder), shuffle=False)
    assert [p.text for p in read.for_step(1)] == ["one two", "three"]
    if folder != "one":
        read = load(tokenizer, str(saved / folder), split="test")
        assert {p.text for p in read.for_step(1)} == {"four"}
        with pytest.raises(UserInputError, match=r"cannot read the folder .*'?train'?, '?test'?"):
            load(tokenizer, str(saved / folder), split="val")


def test_a_folder_without_data_is_named(tokenizer, saved):
    (saved / "empty").mkdir()
    with pytest.raises(UserInputError, match=r"cannot read the folder /.*empty: .*\bdata files"):
        load(tokenizer, str(saved / "empty"))


def test_chat_messages_are_rendered_by_the_models_template(tokenizer, write_prompts):
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}>"
    row = {"prompt": [{"role": "user", "content": "How was it?"}]}
    prompts = load(tokenizer, write_prompts("p.jsonl", json.dumps(row) + "\n"))
    assert prompts.for_step(1)[0].text == "user: How was it?\n>"
    assert prompts.for_step(1)[0].messages == row["prompt"]
    assert prompts.find("user: How was it?\n>") == prompts.for_step(1)[0]
    assert prompts.find("How was it?") is None


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}>"
)


@pytest.fixture
def chatty(tokenizer):
    """A tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    tokenizer.chat_template = CHAT
    return tokenizer


def test_a_conversation_gets_the_system_message_and_the_arguments_of_the_template(
    chatty, write_prompts
):
    own = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": "Hi"}, {"prompt": own[1:]}, {"prompt": own}]
    path = write_prompts("p.json", json.dumps([rows[0]]))
    options = {
        "chat": True, "system": "Be short.", "template_arguments": {"enable_thinking": False}
    }  # fmt: skip
    (prompt,) = load(chatty, path, **options).first(2)
    assert prompt.text == "system: Be short.\nuser: Hi\nno thoughts>"
    assert prompt.messages == [{"role": "system", "content": "Be short."}, own[1]]
    path = write_prompts("q.json", json.dumps(rows[1:]))
    one, two = load(chatty, path, **options).first(3)
    assert one.text == prompt.text
    assert two.text == "system: Be kind.\nuser: Hi\nno thoughts>", "its own message stays"


def test_a_system_message_for_plain_text_is_an_error_that_says_what_to_set(chatty, write_prompts):
    path = write_prompts("p.jsonl", '{"prompt": "Hi"}\n')
    with pytest.raises(UserInputError, match=r"data\.system .*row 1 .*set data\.chat: true"):
        load(chatty, path, system="Be short.")


BAD = {
    "an empty file": ("p.jsonl", "", {}, "is empty"),
    "no such column": ("p.jsonl", '{"text": "x"}\n', {}, "no column 'prompt'.*it has text"),
    "not JSON": ("p.jsonl", "hello\n", {}, "cannot read"),
    "half a line": ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', {}, "cannot read .*p.jsonl"),
    "a bad line": (
        "p.jsonl",
        '{"prompt": "a"}\n{"prompt": "b"\n',
        {},
        "line 2 is not JSON.*delimiter",
    ),
    "a comma behind a line": (
        "p.jsonl",
        '{"prompt": "a"},\n{"prompt": "b"}\n',
        {},
        r"line 1 ends with a comma; each line must be one object, such as",
    ),
    "a comma behind a line of a file named as a single value": (
        "p.json",
        '{"prompt": "a"},\n{"prompt": "b"}\n',
        {},
        "line 1 ends with a comma",
    ),
    "a line with a number": ("p.jsonl", '{"prompt": "a"}\n3\n', {}, "line 2 is not an object"),
    "a bad line after values of two types": (
        "p.jsonl",
        '{"prompt": "a"}\n{"prompt": 3}\nhello\n',
        {},
        r"p\.jsonl as json: line 3 is not JSON \(Expecting value at column 1\)",
    ),
    "a bad line far down": (
        "p.jsonl",
        ('{"prompt": "' + "a" * 100 + '"}\n') * 10_000 + "hello\n",
        {},
        "line 10001 is not JSON",
    ),
    "a key twice": (
        "p.jsonl",
        '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n',
        {},
        "line 2 has the key 'prompt' twice$",
    ),
    "a bad value over lines": (
        "p.json",
        '{\n"prompt": "a",\n]\n}\n',
        {},
        r"p\.json as json: line 3 is not JSON \(.*\); write a list of objects, such as",
    ),
    "a list with a comma behind the last entry": (
        "p.json",
        '[\n{"prompt": "a"},\n]\n',
        {},
        r"p\.json as json: line [23] is not JSON \(.*\); write a list of objects, such as",
    ),
    "a list with a number": (
        "p.json",
        '[{"prompt": "a"}, 3]',
        {},
        "entry 2 of its list is not an object; write a list of objects, such as",
    ),
    "only a number": ("p.json", "3\n", {}, "it is no list; write a list of objects"),
    "a number": ("p.jsonl", '{"prompt": 3}\n', {}, "row 1 .*neither text nor chat"),
    "chat without a template": (
        "p.jsonl",
        '{"prompt": [{"role": "user", "content": "x"}]}\n',
        {},
        "has no chat template",
    ),
    "deep nesting": (
        "p.jsonl",
        '{"prompt": "a"}\n{"prompt": "b", "c": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        {},
        "line 2 of .* is nested more than 50 levels",
    ),
    "deep objects": ("p.json", '[{"prompt": ' + '{"a":' * 3000 + "1" + "}" * 3001, {}, "nested"),
    "all too long": ("p.jsonl", '{"prompt": "a b c d e f"}\n', {"max_prompt_tokens": 1}, "longer"),
    "only a header": ("p.csv", "prompt\n", {}, "holds no rows"),
}


@pytest.mark.parametrize(("name", "text", "keys", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_an_error_on_one_line(tokenizer, write_prompts, name, text, keys, message):
    with pytest.raises(UserInputError, match=message) as caught:
        load(tokenizer, write_prompts(name, text), **keys)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf_8_is_an_error_on_one_line(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "ab\xff"}\n')
    with pytest.raises(
        UserInputError, match=r"cannot read .*p\.jsonl as json: line 1 is not .* UTF-8"
    ):
        load(tokenizer, str(path))


def test_brackets_in_text_are_not_nesting(tokenizer, write_prompts):
    row = json.dumps({"prompt": "a", "more": "[" * 1000 + '\\"'})
    assert len(load(tokenizer, write_prompts("p.jsonl", row + "\n"))) == 1


def test_a_prompt_of_a_megabyte_is_left_out_without_being_tokenised(
    tokenizer, write_prompts, monkeypatch
):
    """A tokenizer can take half a minute for it."""
    rows = [json.dumps({"prompt": text}) for text in ("The film", "ab" * 500_000, "a " * 3000)]
    path = write_prompts("p.jsonl", "\n".join(rows))
    tokenised = []

    def tokenise_texts(_tokenizer, texts, *, special):
        tokenised.extend(map(len, texts))
        return [[1] * len(text) for text in texts]

    monkeypatch.setattr(tokenise, "tokenise_texts", tokenise_texts)
    assert len(load(tokenizer, path, max_prompt_tokens=10)) == 1
    assert tokenised == [8, 6000]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{% if %}", "fails: Expected an expression"),
        ("{{ messages[7].content.x }}", "fails: "),
        ("{{ ''.__class__.__mro__ }}", "fails: "),
    ],
)
def test_a_template_that_fails_or_never_ends_is_an_error_on_one_line(
    write_prompts, monkeypatch, template, message
):
    monkeypatch.setattr(chat_template, "TIME_LIMIT", 0.2)
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    tokenizer.chat_template = template
    row = {"prompt": [{"role": "user", "content": "How was it?"}]}
    with pytest.raises(UserInputError, match=message) as caught:
        load(tokenizer, write_prompts("p.jsonl", json.dumps(row) + "\n"))
    assert "\n" not in str(caught.value)


def test_an_empty_text_is_no_user_message(chatty, write_prompts):
    rows = [{"prompt": text} for text in ("", " \n", "hello")]
    file = write_prompts("p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    prompts = load(chatty, file, chat=True)
    assert (len(prompts), prompts.left_out["empty"]) == (1, 2)


def test_a_prompt_that_is_null_is_named(tokenizer, write_prompts):
    file = write_prompts("p.jsonl", '{"prompt": "hello"}\n{"prompt": null}\n')
    with pytest.raises(UserInputError, match=r"row 2 of .* in column 'prompt' but null"):
        load(tokenizer, file)


def test_a_missing_file_is_named(tokenizer):
    with pytest.raises(UserInputError, match=r"no file at /nowhere/p\.jsonl"):
        load(tokenizer, "/nowhere/p.jsonl")


@settings(max_examples=50)
@given(
    count=st.integers(1, 12),
    per_step=st.integers(1, 9),
    shuffle=st.booleans(),
    step=st.integers(1, 40),
)
def test_the_order_depends_on_the_step_alone_and_every_pass_sees_every_prompt(
    count, per_step, shuffle, step
):
    prompts = [Prompt([i], str(i), {}) for i in range(count)]
    table = PromptTable.of(prompts)
    fresh = Prompts([table], per_step=per_step, shuffle=shuffle, seed=3)
    used = Prompts([table], per_step=per_step, shuffle=shuffle, seed=3)
    order = [p.ids[0] for s in range(1, step + 1) for p in used.for_step(s)]
    assert [p.ids[0] for p in fresh.for_step(step)] == order[-per_step:]
    for first in range(0, len(order) - count + 1, count):
        assert sorted(order[first : first + count]) == list(range(count))


def test_prompts_are_padded_on_the_left_and_repeated_in_adjacent_rows():
    batch = batch_prompts([Prompt([5, 6], "a", {}), Prompt([7], "b", {})], 2, pad=9)
    assert batch.ids.tolist() == [[5, 6], [5, 6], [9, 7], [9, 7]]
    assert batch.lengths.tolist() == [2, 2, 1, 1]
