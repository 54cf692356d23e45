"""The pages a user reads say what the code does."""

import json
import re
import sys
import types
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
import yaml
from textual.binding import Binding

from engine import starter
from engine.config import file as config_file
from engine.config.key_errors import known_keys
from engine.config.rules.run_config import check_config
from engine.config.rules.trackers import TRACKER_PACKAGES
from engine.config.schema import RunConfig
from engine.config.sections.ppo import KLConfig, PPOConfig
from engine.monitoring.channels.webhook import FORMATS
from engine.monitoring.guardrails import DEFAULT_RULES
from engine.monitoring.notify import CHANNELS
from examples import calculator, editor, word_problems
from rlhf_tui.app.steering import BINDINGS as STEERING
from rlhf_tui.cli import MODULES
from scripts import man_page, metrics_page
from scripts.configuration_page import page
from tests.docs.pages import BLOCK, PAGES, blocks, commands, title

KEYS_AS_SHOWN = {"left_square_bracket": "[", "right_square_bracket": "]"}
DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS.parent / "examples"


def test_the_configuration_page_is_what_the_code_would_write():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert text == page(), "run: python -m scripts.configuration_page"


def test_the_metrics_page_is_what_the_code_would_write():
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert text == metrics_page.page(), "run: python -m scripts.metrics_page"


def test_the_manual_page_is_what_the_code_would_write():
    text = (DOCS / "rlhf-tui.1").read_text(encoding="utf-8")
    assert text == man_page.page(), "run: make man"


def test_every_key_stands_on_the_page_and_is_explained():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    for key in known_keys():
        row = next(r for r in rows if r.startswith((f"| `{key}` ", f"| `{key}` ⇄")))
        assert len(row.rstrip(" |").rsplit("|", 1)[1].strip()) > 3, row


def test_every_key_of_ppo_stands_in_the_table_of_a_group():
    (section,) = re.findall(r"^## `ppo`\n(.*?)^## ", page(), re.DOTALL | re.MULTILINE)
    before, *groups = re.split(r"^### ", section, flags=re.MULTILINE)
    assert "| `ppo." not in before
    rows = [len(re.findall(r"^\| `ppo\.", group, re.MULTILINE)) for group in groups]
    assert sum(rows) == len(PPOConfig.__struct_fields__)
    assert min(rows) > 0


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *((PPOConfig, key) for key in ("advantage", "policy_loss", "loss_aggregation", "ratio")),
        (KLConfig, "estimator"),
    ],
)
def test_every_part_of_the_objective_has_its_formula_on_the_page(section, key):
    rows = [r for r in (DOCS / "ppo.md").read_text().splitlines() if r.startswith("| `")]
    for name in get_args(get_type_hints(section)[key]):
        is_default = name == getattr(section(), key)  # stands in the text
        assert is_default or any(f"`{name}` |" in r or f"{key}: {name}` |" in r for r in rows), name


def rows_of(page, section="# "):
    """The first column of every table of a page, or of a section of it."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(section)[2]
    text = text.partition("\n## ")[0] if section.startswith("## ") else text
    return [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]


def test_every_command_of_the_program_stands_on_a_page():
    assert {c.words[0] for each in PAGES for c in commands(each) if c.words} >= set(MODULES)


def test_every_key_that_steers_stands_in_the_table_of_the_page():
    keys = {binding.key for binding in Binding.make_bindings(STEERING)}
    named = {
        key for cell in rows_of("tui.md", "## Steering") for key in re.findall(r"`([^`]+)`", cell)
    }
    assert {KEYS_AS_SHOWN.get(key, key) for key in keys} <= named


def test_every_channel_and_every_format_of_a_webhook_stands_on_the_page():
    text = "".join(rows_of("notifications.md"))
    assert all(f"`{key}`" in text for key in CHANNELS)
    assert all(f"`{name}`" in text or f": {name}`" in text for name in FORMATS)


def test_every_tracker_stands_on_the_page_and_in_the_text_of_its_key():
    (row,) = [row for row in page().splitlines() if row.startswith("| `log.trackers` ")]
    for tracker in TRACKER_PACKAGES:
        assert f"`{tracker}`" in "".join(rows_of("trackers.md"))
        assert f"`{tracker}`" in row


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_every_row_of_a_table_has_the_cells_of_its_heading(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for table in re.findall(r"(?:^ *\|.*\n)+", text, re.MULTILINE):
        heading, *rows = (len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines())
        assert rows == [heading] * len(rows), table.splitlines()[0]


def test_every_example_is_a_configuration():
    for path in [*EXAMPLES.glob("*.yaml"), starter.FOLDER / "demo.yaml"]:
        config_file.load(path)


def test_the_architecture_names_every_module_of_the_engine():
    """In the row of its package. A package within another may have a row of its own."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(engine/[\w/]+)/` \| (.*) \|$", text, re.MULTILINE))
    unnamed = []
    for package, contents in rows.items():
        named = set(re.findall(r"`(\w+)/?`", contents))
        for path in (DOCS.parent / package).iterdir():
            inner = (path / "__init__.py").exists() and f"{package}/{path.name}" not in rows
            module = path.suffix == ".py" and path.stem != "__init__"
            if (inner or module) and path.stem not in named:
                unnamed.append(f"{package}/{path.name}")
    assert unnamed == []
    assert {f"engine/{name}" for name in ("config", "supervisor", "train", "train/ppo")} <= {*rows}


def test_the_default_guard_rails_stand_on_the_page_of_the_app_with_their_thresholds():
    text = (DOCS / "tui.md").read_text(encoding="utf-8")
    for rule in DEFAULT_RULES:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{rule.name}` |"))
        assert row.endswith(f"| {rule.action} |")
        assert f"`{rule.metric}`" in row or rule.metric == "*"
        threshold = next((v for v in (rule.above, rule.below) if v is not None), None)
        change = rule.falls or rule.rises
        assert threshold is None or f"{threshold:g}" in row
        assert change is None or f"{change:.0%}".replace("%", " %") in row
        assert rule.of is None or rule.of in row


def test_the_pages_on_other_libraries_name_keys_that_exist():
    keys, named = known_keys(), set()
    for path in DOCS.glob("from-*.md"):
        lines = path.read_text(encoding="utf-8").splitlines()
        # The second column of a table has our keys.
        ours = "\n".join(line.split(" | ")[1] for line in lines if line.count(" | ") > 1)
        named |= set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)[:`]", ours))
    ours = {name for name in named if name.split(".")[0] in {k.split(".")[0] for k in keys}}
    assert len(ours) > 50
    assert not {name for name in ours if not any(f"{k}.".startswith(f"{name}.") for k in keys)}


def test_the_reward_of_the_word_problems_tells_right_from_wrong(tmp_path):
    data = tmp_path / "problems.jsonl"
    word_problems.write(data, count=50, seed=1)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    answers = [row["answer"] for row in rows]
    as_messages = [[{"role": "assistant", "content": text}] for text in answers]
    assert word_problems.correct(completions=answers, answer=answers, step=1) == [1.0] * 50
    assert word_problems.correct(completions=as_messages, answer=answers) == [1.0] * 50
    wrong = [f"{answer}1" for answer in answers]
    assert word_problems.correct(completions=wrong, answer=answers) == [0.0] * 50
    texts = ["#### 1,200", "so 1200.", "#### 1 #### 1200", "none", "####"]
    given = ["#### 1200"] * len(texts)
    assert word_problems.correct(completions=texts, answer=given) == [1, 1, 1, 0, 0]
    assert word_problems.well_formed(completions=texts) == [1, 0, 0, 0, 0]


def test_the_calculator_of_the_example_computes_calls_and_says_what_is_wrong():
    environment = calculator.Calculator()
    assert environment.well_called() is None
    assert environment.reply("6 * 7 is <calc>6 * 7</calc>") == "42"
    assert environment.reply("<calc>-(1 + 2) / 4</calc>") == "-0.75"
    for wrong in ("9 ** 9", "print(1)", "1 / 0", "a", "", "1e308 * 10 - ", "(" * 300, "\0"):
        assert environment.reply(f"<calc>{wrong}</calc>").startswith("error: "), wrong
    assert environment.reply("#### 42") is None
    assert environment.well_called() == 0.2


def test_the_editor_of_the_example_scores_the_points_that_are_as_asked():
    begun = editor.Editor(seed=3)
    asked = [begun.reply(text) for text in ("A film.", " it is not good.", " it is great.")]
    assert asked[2] is None
    wanted = [text == editor.BEGINNINGS[True] for text in asked[:2]]
    assert begun.as_asked() == [0, 0, wanted[1] / 2]  # the first point has words of both kinds
    assert editor.is_point(" it is Great fun.", good=True)
    assert not editor.is_point(" it is not great.", good=True)
    assert editor.is_point(" it never works.", good=False)
    assert {editor.Editor(seed).reply("A film.") for seed in range(9)} == {
        *editor.BEGINNINGS.values()
    }


def test_the_example_of_the_page_of_environments_is_a_game_that_can_be_won():
    (source,), (row,), (yaml_text, tools) = (
        blocks(DOCS / "environments.md", language) for language in ("python", "json", "yaml")
    )
    whole = yaml.safe_load(yaml_text)
    part = {"model": whole["model"], "reward": {"function": "m:f"}} | yaml.safe_load(tools)
    for tree in (whole, part):
        check_config(msgspec.convert(tree, RunConfig))
    names = {}
    exec(source, names)  # noqa: S102 - ours
    number = json.loads(row)["number"]
    game = names["Guess"](number=number)
    assert game.reply("no idea") == game.reply(f"I say {number - 1}") == "It is higher."
    assert game.reply(f"{number + 1}!") == "It is lower."
    assert game.reply(str(number)) is None
    assert game.score() == 1 / 4
    assert names["Guess"](number=number).score() == 0


def test_an_environment_of_trl_can_be_used_as_its_page_says(monkeypatch):
    class Environment:
        def reset(self, **columns):
            self.number, self.guesses = columns["number"], 0

        def guess(self, number):
            self.guesses += 1
            return "right" if number == self.number else "wrong"

        def get_reward(self):
            return 1 / self.guesses

    module = types.ModuleType("my_environment")
    module.MyEnvironment = Environment
    monkeypatch.setitem(sys.modules, "my_environment", module)
    names = {}
    (source,) = (text for text in blocks(DOCS / "from-trl.md", "python") if "class Adapted" in text)
    exec(source, names)  # noqa: S102 - ours
    (yaml_text,) = (text for text in blocks(DOCS / "from-trl.md", "yaml") if "Adapted" in text)
    config = msgspec.convert(yaml.safe_load(yaml_text) | {"model": {"policy": "m"}}, RunConfig)
    check_config(config)
    adapted = names["Adapted"](prompt="Guess", seed=1, number=5)
    tools = [getattr(adapted, name) for name in config.environment.tools]
    assert [tool(number=n) for tool in tools for n in (4, 5)] == ["wrong", "right"]
    assert getattr(adapted, config.reward.environment)() == 1 / 2


def test_the_lists_of_a_request_on_the_page_of_rewards_have_the_same_length():
    for block in blocks(DOCS / "rewards.md", "json"):
        assert len({len(v) for v in json.loads(block).values() if isinstance(v, list)}) == 1
