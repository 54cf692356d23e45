"""Prompts: the formats of data sets, several by weight, limits of length, and the cache."""

import errno
import fcntl
import json
import os
import stat
import tempfile
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from engine import starter
from engine.config import file as config_file
from engine.config.sections.model import MIXTURE_CYCLE, DataConfig, PromptSource
from engine.errors import UserInputError
from engine.train.data import load_prompts as loading
from engine.train.data.formats import common_start
from engine.train.data.load_prompts import load_prompts, load_sets
from engine.train.data.mixture import Mixture, shares
from engine.train.data.prompt_cache import PromptCache
from engine.train.data.prompt_order import SAME_TEXT, Prompts
from engine.train.data.prompt_table import PromptTable
from engine.train.data.prompts import Prompt
from engine.train.data.randomness import permutation
from engine.train.data.tokenise import PromptTokenizer, tokenise_texts
from engine.train.distributed.ranks import RankGroup
from engine.train.evaluation.held_out import split_prompts
from tests.train.ranks.launch import run_ranks

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}>"


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(starter.resolve("starter:policy"))
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def write_rows(write_prompts):
    """Returns a function that writes rows as JSON Lines and returns the path."""
    return lambda name, rows: write_prompts(name, "".join(json.dumps(r) + "\n" for r in rows))


def load(tokenizer, path, **keys):
    return load_prompts(DataConfig(prompts=path, **keys), tokenizer, per_step=2, seed=0)


def texts(prompts):
    return [p.text for p in prompts.first(len(prompts))]


# -- formats ---------------------------------------------------------------------------------------

ASK = {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello.", "What?"))
FORMATS = {
    "prompt-only": ({"prompt": "The film"}, "The film"),
    "prompt-completion": ({"prompt": "The film", "completion": " was good"}, "The film"),
    "preference": ({"prompt": "The film", "chosen": " was", "rejected": " is"}, "The film"),
    "preference, implicit prompt": (
        {"chosen": "The film was good", "rejected": "The film is bad"}, "The film"
    ),
    "conversational": ({"prompt": [ASK]}, "user: Hi\n>"),
    "conversational preference": (
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, "user: Hi\n>"
    ),
    "conversational preference, implicit prompt": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, "user: Hi\n>"
    ),
    "conversations": ({"messages": [ASK, GOOD]}, "user: Hi\n>"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "text"), FORMATS.values(), ids=FORMATS.keys())
def test_each_format_of_trl_gives_its_prompt(tokenizer, write_rows, row, text):
    (prompt,) = load(tokenizer, write_rows("p.jsonl", [row])).first(2)
    assert prompt.text == text
    assert prompt.row == row


def test_a_column_that_is_named_is_not_replaced_by_another(tokenizer, write_rows):
    path = write_rows("p.jsonl", [{"chosen": "a b", "rejected": "a c"}])
    with pytest.raises(UserInputError, match="no column 'question'"):
        load(tokenizer, path, column="question")


def test_completions_of_different_kinds_have_no_common_prompt():
    assert common_start("text", [ASK]) is None
    assert common_start("same", "same") == "same"


# -- order -----------------------------------------------------------------------------------------


def test_the_order_of_a_single_data_set_is_that_of_earlier_versions(tokenizer, write_rows):
    words = ["one", "two", "three", "four", "five"]
    prompts = load(tokenizer, write_rows("p.jsonl", [{"prompt": w} for w in words]))
    order = permutation(0, "data", (0,), 5).tolist()
    assert [p.text for s in (1, 2) for p in prompts.for_step(s)] == [words[i] for i in order[:4]]
    redrawn = permutation(0, "redraw", (7, 1), 5).tolist()
    assert [p.text for p in prompts.replacements(7, 1, 3)] == [words[i] for i in redrawn[:3]]


def test_batches_are_tokenised_like_single_texts(tokenizer):
    found = ["The film", "", "was a lot of fun, though it is long."]
    assert tokenise_texts(tokenizer, found) == [list(tokenizer(t)["input_ids"]) for t in found]


def several(sizes, weights, **keys):
    tables = [
        PromptTable.of([Prompt([i], f"{name}{i}", {name: i}) for i in range(size)])
        for name, size in zip("abc", sizes, strict=False)
    ]
    return Prompts(tables, per_step=4, shuffle=True, seed=3, weights=weights, **keys)


def test_of_several_data_sets_each_has_its_share_and_passes_of_its_own():
    prompts = several((7, 30), (3, 1))
    drawn = [p.text for s in range(1, MIXTURE_CYCLE // 4 + 1) for p in prompts.for_step(s)]
    ours = [text for text in drawn if text.startswith("a")]
    assert len(ours) == MIXTURE_CYCLE * 3 // 4
    for first in range(0, 7 * 100, 7):
        assert len(set(ours[first : first + 7])) == 7


def test_what_a_step_draws_from_several_data_sets_depends_on_the_step_alone():
    used, step = several((7, 30, 2), (3, 1, 0.5)), 2 * MIXTURE_CYCLE // 4
    for before in range(step - 3, step):
        used.for_step(before)
    assert several((7, 30, 2), (3, 1, 0.5)).for_step(step) == used.for_step(step)


def test_shares_add_up_and_none_is_lost():
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([1e-4, 1], 10_000) == [1, 9999]
    assert sum(shares([0.3, 0.3, 0.4, 1e-3], MIXTURE_CYCLE)) == MIXTURE_CYCLE
    mixture = Mixture([1, 2], seed=0)
    assert sorted(mixture.at(i)[1] for i in range(3 * 10) if mixture.at(i)[0] == 0)[:3] == [0, 1, 2]


def test_a_prompt_of_one_of_several_data_sets_has_the_columns_of_all():
    prompts = several((3, 3), (1, 1))
    held_out, one = (prompts.hold_out(count)[1] for count in (4, 1))  # the last is of one data set
    for some in (prompts.for_step(1), prompts.first(6), held_out.first(4), one.first(1)):
        assert all(p.row.keys() == {"a", "b"} for p in some)


def test_what_is_held_out_of_several_data_sets_is_in_no_step():
    training, held = several((9, 5), (1, 1)).hold_out(4)
    trained = {p.text for s in range(1, 40) for p in training.for_step(s)}
    assert len(held) == 4
    assert trained == set(texts(training))
    assert not trained & set(texts(held))
    assert held.without_texts_of(held) is None
    assert texts(held.without_texts_of(training)) == texts(held)


def test_training_prompts_with_the_text_of_a_held_out_one_are_counted_and_logged(caplog):
    table = PromptTable.of([Prompt([i], f"text {i % 4}", {}) for i in range(12)])
    prompts = Prompts([table], per_step=4, shuffle=True, seed=3, left_out={"empty": 2})
    config = config_file.load(starter.FOLDER / "demo.yaml", ["eval.holdout=1"])
    with caplog.at_level("WARNING", "engine"):
        training, _ = split_prompts(config, prompts, None, RankGroup(config.launch))
    assert len(training) == 9
    assert training.left_out == {"empty": 2, SAME_TEXT: 2}
    assert "2 of 12 prompts left out: 2 with the text of a held-out one" in caplog.text


# -- limits of length ------------------------------------------------------------------------------


def test_prompts_that_are_left_out_are_counted_by_reason(tokenizer, write_rows):
    rows = [{"prompt": t} for t in ("", "The", "The film was", "The film " * 30, "ab" * 500_000)]
    prompts = load(tokenizer, write_rows("p.jsonl", rows), min_prompt_tokens=2,
                   max_prompt_tokens=20)  # fmt: skip
    assert texts(prompts) == ["The film was"]
    assert prompts.left_out == {"too long": 2, "too short": 1, "empty": 1}


# -- the cache -------------------------------------------------------------------------------------

ROWS = [{"prompt": f"The film number {i}", "n": i, "tags": ["x"] * (i % 3)} for i in range(50)]


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Caches data sets of any size; returns the folder."""
    monkeypatch.setattr(loading, "CACHED_BYTES", 0)
    monkeypatch.setattr(loading, "BATCH_ROWS", 8)
    return tmp_path / "cache"


def all_of(prompts):
    return prompts.first(len(prompts)), prompts.for_step(3), prompts.longest


def test_the_prompts_from_the_cache_are_those_in_memory(tokenizer, write_rows, cached, monkeypatch):
    path = write_rows("p.jsonl", ROWS)
    keys = {"chat": True, "max_prompt_tokens": 30}
    first = load(tokenizer, path, cache=str(cached), **keys)
    monkeypatch.setattr(PromptTokenizer, "encode", None)  # the second time nothing is tokenised
    second = load(tokenizer, path, cache=str(cached), **keys)
    monkeypatch.undo()
    in_memory = load(tokenizer, path, **keys)
    assert all_of(first) == all_of(second) == all_of(in_memory)
    assert second.find(in_memory.first(7)[6].text) == in_memory.first(7)[6]


def test_only_the_owner_may_read_the_cache_and_nothing_else_is_left_in_it(
    tokenizer, write_rows, cached
):
    load(tokenizer, write_rows("p.jsonl", ROWS), cache=str(cached))
    (entry,) = cached.iterdir()
    for path in (cached, entry, *entry.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.slow
def test_conversations_that_several_processes_tokenise_keep_their_order(
    tokenizer, write_rows, cached, monkeypatch
):
    path = write_rows("p.jsonl", ROWS)
    monkeypatch.setattr(loading, "worker_count", lambda _count: 2)
    found = load(tokenizer, path, cache=str(cached), chat=True)
    monkeypatch.undo()
    assert all_of(found) == all_of(load(tokenizer, path, chat=True))


@pytest.mark.parametrize("change", ["rows", "template", "column"])
def test_what_changes_the_tokens_changes_the_entry(tokenizer, write_rows, cached, change):
    rows = [row | {"other": row["prompt"]} for row in ROWS]
    path = write_rows("p.jsonl", rows)
    keys = {"cache": str(cached), "chat": True}
    before = load(tokenizer, path, **keys)
    match change:
        case "rows":
            write_rows("p.jsonl", [*rows, {"prompt": "One more", "n": 1, "tags": []}])
        case "template":
            tokenizer.chat_template = CHAT + " "
        case "column":
            keys["column"] = "other"
    after = load(tokenizer, path, **keys)
    assert len(list(cached.iterdir())) == 2
    assert (texts(before) == texts(after)) == (change == "column")


def test_a_damaged_entry_is_made_again(tokenizer, write_rows, cached):
    path = write_rows("p.jsonl", ROWS)
    before = all_of(load(tokenizer, path, cache=str(cached)))
    (entry,) = cached.iterdir()
    file = entry / "prompts.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    assert all_of(load(tokenizer, path, cache=str(cached))) == before
    assert len(list(cached.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_key(
    tokenizer, write_rows, cached
):
    cached.write_text("a file")
    with pytest.raises(UserInputError, match=r"data\.cache: cannot write in .*; name another"):
        load(tokenizer, write_rows("p.jsonl", ROWS), cache=str(cached))


def test_without_a_writable_home_the_cache_is_a_private_folder_under_tmpdir(
    tokenizer, write_rows, cached, monkeypatch, tmp_path, caplog
):
    path = write_rows("p.jsonl", ROWS)
    monkeypatch.setenv("XDG_CACHE_HOME", path)  # a file
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = all_of(load(tokenizer, path))
    second = tmp_path / f"rlhf-tui-{os.getuid()}"
    assert stat.S_IMODE(second.stat().st_mode) == 0o700
    assert len(list((second / "prompts").iterdir())) == 1
    (said,) = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
    assert str(second) in said
    assert "data.cache names another folder" in said
    monkeypatch.setattr(PromptTokenizer, "encode", None)  # the second time nothing is tokenised
    assert all_of(load(tokenizer, path)) == first


def test_where_others_can_enter_the_second_folder_too_prompts_are_kept_in_memory(
    tokenizer, write_rows, cached, monkeypatch, tmp_path
):
    path = write_rows("p.jsonl", ROWS)
    monkeypatch.setenv("XDG_CACHE_HOME", path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (second := tmp_path / f"rlhf-tui-{os.getuid()}").mkdir()
    second.chmod(0o755)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(path, "no folder"))
    assert len(load(tokenizer, path)) == 50
    assert not list(second.iterdir())


def test_a_file_needs_no_cache_of_datasets(tokenizer, write_rows, monkeypatch):
    path = write_rows("p.jsonl", ROWS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(path, "no folder"))
    assert len(load(tokenizer, path)) == 50


def test_a_cache_of_datasets_that_cannot_be_written_is_named_with_its_remedy(
    tokenizer, write_rows, monkeypatch, tmp_path
):
    (folder := tmp_path / "set").mkdir()
    path = write_rows("set/train.jsonl", ROWS[:3])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(path, "no folder"))
    with pytest.raises(UserInputError, match=r"cannot be written .*Not a directory.*set HF_HOME"):
        load(tokenizer, str(folder))


def test_a_file_that_changes_while_it_is_read_leaves_no_entry(
    tokenizer, write_rows, cached, monkeypatch
):
    path = write_rows("p.jsonl", ROWS)
    hashed = loading.content_hash

    def hash_then_write(*arguments):
        name = hashed(*arguments)
        write_rows("p.jsonl", ROWS[:20])
        return name

    monkeypatch.setattr(loading, "content_hash", hash_then_write)
    with pytest.raises(UserInputError, match="changed while it was read"):
        load(tokenizer, path, cache=str(cached))
    assert not list(cached.iterdir())


@pytest.mark.parametrize("fault", ["no locks", "files of another user"])
def test_a_cache_on_an_unusual_file_system_leaves_prompts_in_memory(
    tokenizer, write_rows, cached, monkeypatch, tmp_path, fault
):
    def no_locks(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if fault == "no locks":
        monkeypatch.setattr(fcntl, "fcntl", no_locks)
    else:  # as on NFS, which writes what root writes as nobody
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert len(load(tokenizer, write_rows("p.jsonl", ROWS))) == 50


def test_an_entry_that_another_run_made_meanwhile_is_used(
    tokenizer, write_rows, cached, monkeypatch
):
    path = write_rows("p.jsonl", ROWS)
    load(tokenizer, path, cache=str(cached))
    (entry,) = cached.iterdir()
    made = entry.stat().st_ino
    find = PromptCache.find
    looks = iter([None])  # the first look is too early
    monkeypatch.setattr(PromptCache, "find", lambda cache, name: next(looks, find(cache, name)))
    assert len(load(tokenizer, path, cache=str(cached))) == 50
    assert [folder.stat().st_ino for folder in cached.iterdir()] == [made]


def test_making_an_entry_reports_its_progress(tokenizer, write_rows, cached):
    told = []
    config = DataConfig(prompts=write_rows("p.jsonl", ROWS), cache=str(cached))

    def begin(part):
        told.append(part)
        return lambda done, total: told.append((done, total))

    load_sets(config, tokenizer, begin=begin)
    assert told[:3] == ["read", "tokenise", (8, 50)]
    assert told[-1] == (50, 50)


def test_several_data_sets_have_columns_and_caches_of_their_own(tokenizer, write_rows, cached):
    sources = [
        PromptSource(path=write_rows("a.jsonl", ROWS)),
        PromptSource(path=write_rows("b.jsonl", [{"q": "Why"}, {"q": "How"}]), column="q"),
    ]
    prompts = load(tokenizer, sources, cache=str(cached))
    assert len(prompts) == 52
    assert len(list(cached.iterdir())) == 2
    assert prompts.find("Why").row == {"prompt": None, "n": None, "tags": None, "q": "Why"}


# -- ranks -----------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parent / "ranks" / "prompts.py"


def test_every_rank_has_the_prompts_that_one_of_them_tokenised(tmp_path, write_rows):
    rows = [{"prompt": f"The film {i} " + "was " * (i % 4)} for i in range(40)]
    done = run_ranks(2, SCRIPT, tmp_path, write_rows("p.jsonl", rows), folder=tmp_path)
    assert done.code == 0, done.output
    lead, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for ours, theirs in zip(lead, other, strict=True):
        assert ours["prompts"] == theirs["prompts"] == lead[0]["prompts"]
        assert ours["left_out"] == theirs["left_out"]
        assert (ours["rows"], theirs["rows"]) == (True, False)
    (shared,), (sent,) = ([*(tmp_path / name).iterdir()] for name in ("shared", "of-1"))
    assert sent.name == f"{shared.name}-prompts"
