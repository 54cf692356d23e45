"""Checks the files that a configuration names, and its packages, before anything is started."""

import re
from pathlib import Path

from engine import starter
from engine.config.model_folder import (
    ADAPTER_CONFIG,
    check_adapters,
    folder_error,
    has_config,
    is_file,
    is_folder,
)
from engine.config.paths import DATA_FILES
from engine.config.schema import RunConfig
from engine.config.sections.environment import EnvironmentConfig
from engine.config.sections.model import ModelConfig
from engine.errors import ConfigError
from engine.launch.function_lookup import check_function
from engine.launch.packages import missing_packages

HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)
"""The ids of models and data sets on the hub."""


def check_inputs(config: RunConfig) -> None:
    """Checks the files that a configuration names, and its packages, before a session is created.

    The ranks check them again in detail. This check is fast, because it does not import torch and
    starts no process: forms call it while the operator types.

    Raises:
        ConfigError: a file, a folder, a reward function or a package is missing, or is obviously of
            the wrong kind.
    """
    if missing := missing_packages(config):
        raise ConfigError(missing[0])
    check_files(config)


def check_files(config: RunConfig) -> None:
    """The same without the packages of this installation, for a run elsewhere."""
    single = isinstance(config.data.prompts, str)
    for i, prompts in enumerate(config.data.sources):
        _check_prompts("data.prompts" if single else f"data.prompts[{i}].path", prompts.path)
    _check_chat_template(config.data.chat_template)
    _check_policy(config.model)
    _check_model("model.reference", config.model.reference)
    many = len(config.reward.sources()) > 1
    sources = {
        f"reward.mix[{i}]" if many else "reward": source
        for i, source in enumerate(config.reward.sources())
    }
    if config.eval.every:
        _check_prompts("eval.prompts", config.eval.prompts or "")
        sources |= {f"eval.rewards[{i}]": s for i, s in enumerate(config.eval.rewards)}
    for key, source in sources.items():
        _check_model(f"{key}.model", source.model)
        if source.function is not None:
            check_function(f"{key}.function", source.function, config.reward.path)
    _check_environment(config.environment)


def _check_policy(model: ModelConfig) -> None:
    folder = Path(model.policy)
    if model.gguf_file is None:
        _check_model("model.policy", model.policy)
    elif folder.is_absolute() and not is_file(folder / model.gguf_file):
        raise ConfigError(f"model.gguf_file: no file at {folder / model.gguf_file}")


def _check_model(key: str, name: str | None) -> None:
    if name is None:
        return
    folder = Path(name)
    if not folder.is_absolute():
        _check_hub_id(key, name, "folder")
        return
    if is_file(folder / ADAPTER_CONFIG):
        check_adapters(key, folder)
    elif not has_config(folder):
        raise ConfigError(folder_error(key, folder))


def _check_hub_id(key: str, name: str, local: str) -> None:
    """Requires a name that models and data sets on the hub can have."""
    if starter.resolve(name) != name:
        return
    if name.startswith(starter.PREFIX):
        known = ", ".join(starter.PREFIX + part for part in starter.PARTS)
        raise ConfigError(f"{key}: there is no '{name}', but {known}")
    if not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{key}: '{name}' is neither an existing {local} nor an id on the hub, such as "
            "organisation/name"
        )


def _check_environment(environment: EnvironmentConfig) -> None:
    if environment.factory is not None:
        check_function(
            "environment.factory", environment.factory, environment.path, "class or function"
        )
    for i, tool in enumerate(environment.tools):
        if ":" in tool:
            check_function(f"environment.tools[{i}]", tool, environment.path)


def _check_prompts(key: str, source: str) -> None:
    prompts = Path(source)
    if not prompts.is_absolute():
        if source:
            _check_hub_id(key, source, "file or folder")
        return
    if not is_file(prompts):
        if is_folder(prompts):  # of a data set; what is in it, its loader finds out
            return
        raise ConfigError(f"{key}: no file at {prompts}")
    if prompts.suffix.lower() not in DATA_FILES:
        endings = ", ".join(DATA_FILES)
        raise ConfigError(f"{key}: {prompts} should end in one of {endings}")
    if prompts.stat().st_size == 0:
        raise ConfigError(f"{key}: {prompts} is empty; give at least one prompt")


def _check_chat_template(template: str | None) -> None:
    if template is not None and "{" not in template and not is_file(Path(template)):
        raise ConfigError(
            f"data.chat_template: no file at {template}, and it is not a Jinja template"
        )
