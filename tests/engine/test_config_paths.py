"""Which keys hold a path: those are relative to the configuration file, however they are given."""

import msgspec
import pytest

from engine import starter
from engine.config import file as config_file
from engine.config.paths import path_keys
from engine.config.schema import RunConfig

SCORE = ("revision", "label", "function", "service", "judge", "environment")
JUDGING = (
    "http.token_env",
    "http.label_column",
    *(f"judging.{k}" for k in ("model", "template", "parse")),
)
SOURCES = ("reward", "reward.mix[]", "eval.rewards[]")
OTHER_TEXTS = {
    "data.prompts[].column", "data.prompts[].split", "data.column", "data.system", "data.split",
    "model.revision", "model.gguf_file", "model.reference_revision", "lora.targets[]",
    *(f"{source}.{key}" for source in SOURCES for key in (*SCORE, *JUDGING)),
    "reward.mix[].name", "eval.rewards[].name", "eval.column", "eval.split",
    "environment.factory", "environment.tools[]", "environment.call_pattern",
    "rollout.rendezvous", "rollout.stop[]", "launch.rendezvous",
    "train.stop_at.metric", "train.best_metric", "train.save_before_deadline",
    "log.trackers[]", "log.project",
    "guardrails.rules[].name", "guardrails.rules[].metric", "guardrails.rules[].of",
    "guardrails.rules[].advice",
    "notify.command", "notify.email[]", "notify.quiet_hours", "notify.webhooks[].url_variable",
    "notify.webhooks[].token_variable", "notify.webhooks[].chat",
}  # fmt: skip
"""Keys whose value is text and no path of its own. `model.gguf_file` is in the policy's folder."""


def text_keys(kind, key=""):
    """Every key whose value may be text that is not one of a few words."""
    match kind:
        case msgspec.inspect.StructType():
            for field in kind.fields:
                yield from text_keys(field.type, f"{key}.{field.encode_name}".removeprefix("."))
        case msgspec.inspect.ListType():
            yield from text_keys(kind.item_type, f"{key}[]")
        case msgspec.inspect.UnionType():
            for one in kind.types:
                yield from text_keys(one, key)
        case msgspec.inspect.Metadata():
            yield from text_keys(kind.type, key)
        case msgspec.inspect.StrType():
            yield key


def test_a_key_whose_value_is_text_is_a_path_or_is_known_to_be_none():
    texts = set(text_keys(msgspec.inspect.type_info(RunConfig)))
    assert texts - path_keys().keys() == OTHER_TEXTS
    assert path_keys().keys() <= texts


PLACES = {
    "data.prompts[].path": ("data.prompts=[{path: VALUE}]", lambda c: c.data.sources[0].path),
    "reward.mix[].model": ("reward={mix: [{model: VALUE}]}", lambda c: c.reward.mix[0].model),
    "eval.rewards[].model": (
        "eval.rewards=[{name: j, model: VALUE}]", lambda c: c.eval.rewards[0].model
    ),
}  # fmt: skip
"""How keys in a list are given, and read."""


def value_of(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", sorted(path_keys()))
def test_a_relative_path_starts_at_the_folder_it_was_given_in(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, read = PLACES.get(key, (f"{key}=VALUE", lambda config: value_of(config, key)))
    demo = config_file.load(starter.FOLDER / "demo.yaml")
    loaded = config_file.override(demo, [given.replace("VALUE", "./there/x")])
    assert read(loaded) == str(tmp_path / "there" / "x")


def test_a_program_without_a_slash_is_looked_for_when_it_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "msmtp").touch()
    demo = config_file.load(starter.FOLDER / "demo.yaml")
    loaded = config_file.override(demo, ["notify.sendmail=msmtp"])
    assert loaded.notify.sendmail == "msmtp"
