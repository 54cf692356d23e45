"""Adapters as a model: which base model they need is checked before anything is started."""

import json
from pathlib import Path

import pytest

from engine import starter
from engine.config.model_folder import AdapterBase, adapter_base
from engine.errors import ConfigError
from engine.launch.inputs import check_inputs
from tests.engine.demo_config import demo


def write(folder, base, *, weights="adapter_model.safetensors", **values):
    """A folder of adapters as peft writes it; nothing reads the weights here."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {"base_model_name_or_path": base, "peft_type": "LORA", **values}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    (folder / weights).write_bytes(b"")
    return folder


def model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def base_of(folder):
    return adapter_base(folder / "adapter_config.json", str(folder), "model.policy")


@pytest.mark.parametrize("name", ["models/base", "./models/base", "../project/models/base"])
def test_a_relative_base_is_looked_for_from_the_adapters_folder_upwards(tmp_path, name):
    base = model(tmp_path / "project" / "models" / "base")
    adapters = write(tmp_path / "project" / "out" / "sft" / "checkpoint-20", name)
    assert base_of(adapters) == AdapterBase(str(base))


def test_an_absolute_base_and_one_on_the_hub_stay(tmp_path):
    base = model(tmp_path / "base")
    assert base_of(write(tmp_path / "a", str(base))) == AdapterBase(str(base))
    hub = write(tmp_path / "b", "some-org/some-model", revision="abc")
    assert base_of(hub) == AdapterBase("some-org/some-model", "abc")
    assert base_of(write(tmp_path / "c", "starter:policy")).name == starter.resolve(
        "starter:policy"
    )


def test_adapters_are_accepted_for_every_model(tmp_path):
    base = model(tmp_path / "base")
    first = write(tmp_path / "first", str(base))
    second = write(tmp_path / "second", "../first")
    keys = ("model.policy", "model.reference", "reward.model")
    check_inputs(demo(*(f"{key}={second}" for key in keys)))
    assert base_of(second) == AdapterBase(str(first))


BROKEN = {
    "a base that is gone": ("../gone", {}, "which is not a model folder here"),
    "an absolute one that is gone": ("/gone/base", {}, "which is not a model folder here"),
    "deep in a folder that is gone": ("out/models/base", {}, "which is not a model folder here"),
    "its own folder": (".", {}, "which is not a model folder here"),
    "no base": (None, {}, "an unknown model: name it in"),
    "no text": (5, {}, "cannot be read: "),
    "a pickle": ("org/model", {"weights": "adapter_model.bin"}, "a pickle can run code"),
    "no weights": ("org/model", {"weights": "README.md"}, "holds no adapter_model.safetensors"),
}


@pytest.mark.parametrize(("base", "options", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_adapters_that_cannot_be_loaded_are_refused_before_a_start(
    tmp_path, base, options, message
):
    adapters = write(tmp_path / "sft", base, **options)
    with pytest.raises(ConfigError, match=message) as caught:
        check_inputs(demo(f"model.policy={adapters}"))
    assert str(caught.value).startswith("model.policy: ")
    assert str(Path(adapters)) in str(caught.value)


def test_adapters_for_each_other_are_refused(tmp_path):
    first = write(tmp_path / "first", str(tmp_path / "second"))
    write(tmp_path / "second", str(first))
    with pytest.raises(ConfigError, match="are their own base model"):
        check_inputs(demo(f"model.policy={first}"))
