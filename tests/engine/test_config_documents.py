"""Any document, hostile ones included, is a configuration or is refused in one line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import file as config_file
from engine.config.key_errors import known_keys
from engine.config.schema import RunConfig
from engine.config.yaml_document import parse_yaml
from engine.errors import ConfigError
from engine.launch.inputs import check_inputs
from tests.engine.demo_config import demo

modest = settings(max_examples=50, deadline=None, derandomize=True)


WORDS = st.text(st.characters(codec="utf-8"), max_size=40)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda child: st.lists(child, max_size=3) | st.dictionaries(WORDS, child, max_size=3),
    max_leaves=8,
)


@modest
@given(st.sampled_from(known_keys()), TREES)
def test_any_value_of_any_key_is_taken_or_refused_in_one_sentence(key, value):
    tree = config_file.to_tree(demo())
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    try:
        assert isinstance(config_file.from_tree(tree), RunConfig)
    except ConfigError as error:
        assert str(error)


@modest
@given(WORDS)
def test_any_override_is_taken_or_refused(text):
    try:
        demo(text)
    except ConfigError as error:
        assert str(error)


@modest
@given(WORDS)
def test_any_text_is_yaml_or_refused_naming_where(text):
    try:
        parse_yaml(text, "here")
    except ConfigError as error:
        assert str(error).startswith("here")


@modest
@given(TREES)
def test_any_document_is_a_configuration_or_refused(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError):
        config_file.load(path)


SCALARS = st.one_of(
    WORDS,
    st.sampled_from([
        "*a", "&a", "&a x", "!!timestamp x", "!!int ''", "!!float x", "!!bool x", "!!binary é",
        "!!null x", "!!set {a}", "!!omap [a]", "!!python/object:os.system x", "2020-13-45", "~",
        '"\\ud800"', '"\\0"', '"\\x1b[31m"', "1" * 5000, ".nan", "-.inf", "0x", "1:99", "<<", "=",
        "x" * 300, "./" + "y" * 300, "a: b: c", "? [x]", "starter:policy", "1e-5", "- ",
    ]),
)  # fmt: skip


DOCUMENTS = st.recursive(
    SCALARS,
    lambda child: st.one_of(
        st.lists(child, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(child, max_size=4).map(lambda items: f"&a [{', '.join(items)}, *a]"),
        st.lists(
            st.tuples(st.one_of(st.sampled_from(["model", "<<", "1", "ppo"]), child), child),
            max_size=4,
        ).map(lambda pairs: "&a {" + ", ".join(f"{k}: {v}" for k, v in pairs) + "}"),
    ),
    max_leaves=12,
)


@modest
@given(st.sampled_from([k for k in known_keys() if k != "notify.command"]), DOCUMENTS)
def test_any_yaml_at_any_key_is_taken_or_refused_in_one_line(tmp_path_factory, key, text):
    *sections, last = key.split(".")
    lines = [f"{'  ' * i}{name}:" for i, name in enumerate(sections)]
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    value = f"{'  ' * len(sections)}{last}: {text}"
    path.write_text("\n".join([*lines, value]), encoding="utf-8", errors="surrogatepass")
    for load in (lambda: config_file.load(path), lambda: demo(f"{key}={text}")):
        try:
            config = load()
        except ConfigError as error:
            assert 0 < len(str(error)) < 1000
        else:
            path.write_text(config_file.dump(config), encoding="utf-8")
            assert config_file.load(path) == config


BOMB = "\n".join(
    ["a0: &a0 {x: 1}"]
    + [f"a{i}: &a{i}\n  k{i}: {i}\n  <<: [{', '.join(f'*a{i - 1}' for _ in range(9))}]"
       for i in range(1, 28)]
)  # fmt: skip


LAUGHS = "\n".join(
    ["a0: &a0 [1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 28)]
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "unknown key 'a0'"),
        ("kl: {beta: 1}\ndata: {}\nkl: {target: 1}", "'kl' is given twice, in lines 1 and 3"),
        (LAUGHS, "too large or contains itself"),
        ("model: &a [*a]", "too large or contains itself"),
        ("1: 2", "a key must be text, not 1"),
        ("model:\n\tpolicy: x", "line 2: a tab, where YAML only takes spaces"),
        ("model: {policy: x}\nnull: 3", "a key must be text, not null"),
        ("seed: !!timestamp x", "a value does not fit its tag"),
        ('model: {policy: "\\ud800"}', "model.policy is not valid Unicode text"),
        ('model: {policy: "a\\0b"}', "model.policy contains a NUL character"),
        (f"? {'x' * 20_000}\n: 3", "unknown key"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_documents_are_refused_at_once_in_one_readable_line(tmp_path, text, problem):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as caught:
        config_file.load(path)
    assert len(str(caught.value)) < 1000


def test_what_is_no_yaml_file_is_told_without_the_words_of_python(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF\xd0\x00")
    for path, says in (
        (program, f"{program} is not a YAML file: it holds no text in UTF-8"),
        (tmp_path, f"cannot read {tmp_path}: Is a directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            config_file.load(path)
        assert str(caught.value) == says


@pytest.mark.parametrize("kind", ["a loop of links", "a long name", "NUL"])
def test_a_path_that_cannot_be_opened_is_refused_in_one_line(tmp_path, kind):
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    path = {"a loop of links": loop, "a long name": tmp_path / ("x" * 300), "NUL": "a\0b"}[kind]
    with pytest.raises(ConfigError, match="cannot read"):
        config_file.load(Path(path))
    if kind != "NUL":
        for key in ("data.prompts", "model.policy", "reward.model"):
            with pytest.raises(ConfigError, match=key):
                check_inputs(demo(f"{key}={path}"))


def test_text_that_looks_like_a_number_is_written_in_quotes(tmp_path):
    config = demo("data.column='1e5'")
    path = tmp_path / "config.yaml"
    path.write_text(config_file.dump(config), encoding="utf-8")
    assert config_file.load(path).data.column == "1e5"


@pytest.mark.parametrize(
    "text",
    ["[" * 30_000, "{a: " * 30_000, "- " * 30_000, "\n".join(["[a,"] * 30_000)],
    ids=["brackets", "sections", "lists in a line", "brackets in lines"],
)
def test_however_deep_a_document_is_the_process_survives_it(text):
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse_yaml(text, "run.yaml")


def test_a_key_may_override_one_that_is_merged():
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\nd: {<<: [*b, *a]}\n"
    tree = parse_yaml(text, "here")
    assert (tree["b"], tree["c"], tree["d"]) == ({"x": 2, "y": 1}, {"x": 3, "y": 1}, tree["b"])


def test_of_two_merged_sections_the_first_gives_a_key_that_both_have():
    tree = parse_yaml("first: &a {key: 1}\nsecond: &b {key: 2}\nboth: {<<: [*a, *b]}\n", "here")
    assert tree["both"] == tree["first"]
