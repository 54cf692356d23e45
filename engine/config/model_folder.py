"""What a model's folder holds, and error messages about it with one wording for all callers."""

from pathlib import Path

import msgspec

from engine import starter
from engine.errors import ConfigError, first_line
from engine.examined import examined

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt",
)  # fmt: skip
"""The files of tokenizers: a folder with one of almost any kind holds one of them."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"


class AdapterBase(msgspec.Struct, frozen=True):
    """The model that adapters were trained on."""

    name: str
    """An absolute path, or an id on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""


class _AdapterConfig(msgspec.Struct):
    """What is read here of peft's file."""

    base_model_name_or_path: str | None = None
    revision: str | None = None


def has_config(folder: Path) -> bool:
    """Whether a folder holds the configuration of a Hugging Face model."""
    return is_file(folder / "config.json")


def is_model(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model, or adapters for one."""
    return has_config(folder) or is_file(folder / ADAPTER_CONFIG)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any(is_file(folder / name) for name in TOKENIZER_FILES)


def adapter_base(config: Path, source: str, key: str) -> AdapterBase:
    """Reads which model adapters need.

    peft writes the name as the training program was given it, so a relative path started at that
    program's working folder. It is looked for in the folder of the adapters and those above it.

    Args:
        config: peft's `adapter_config.json`.
        source: what holds the adapters, a folder or a hub id.
        key: the configuration key that names the source, for error messages.

    Raises:
        ConfigError: the file names no model, or a folder that does not exist.
    """
    try:
        content = msgspec.json.decode(config.read_bytes(), type=examined(_AdapterConfig))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {config} cannot be read: {first_line(error)}") from error
    name = starter.resolve(content.base_model_name_or_path or "")
    if not name:
        raise ConfigError(
            f"{key}: {source} holds adapters for an unknown model: name it in {config}, as "
            "base_model_name_or_path"
        )
    folder = Path(source)
    for start in (folder, *folder.parents) if is_folder(folder) else ():
        if is_model(found := start / name) and found.resolve() != folder.resolve():
            return AdapterBase(str(found.resolve()))
    # An id on the hub has at most one slash.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"{key}: the adapters in {source} were trained on {name}, which is not a model folder "
            f"here: write its path or hub id into {config}, as base_model_name_or_path"
        )
    return AdapterBase(name, content.revision)


def check_adapters(key: str, folder: Path) -> None:
    """Checks that a folder with adapters has their weights, and that their base model exists.

    Raises:
        ConfigError: it does not; the message says what to do.
    """
    checked = []
    while is_file(folder / ADAPTER_CONFIG):
        if folder in checked:
            raise ConfigError(f"{key}: the adapters in {folder} are their own base model")
        checked.append(folder)
        if not is_file(folder / ADAPTER_WEIGHTS):
            pickle = is_file(folder / ADAPTER_PICKLE)
            raise ConfigError(no_adapter_weights(key, str(folder), pickle=pickle))
        folder = Path(adapter_base(folder / ADAPTER_CONFIG, str(folder), key).name)


def no_adapter_weights(key: str, source: str, *, pickle: bool) -> str:
    """The error message about adapters without weights in safetensors."""
    if not pickle:
        return f"{key}: {source} holds no {ADAPTER_WEIGHTS} (expected: adapters saved by peft)"
    return (
        f"{key}: {source} holds its weights in {ADAPTER_PICKLE}, and a pickle can run code when it "
        "is loaded: save the adapters with safetensors, as peft does by default"
    )


def folder_error(key: str, folder: Path, what: str = "model", reason: str = "") -> str:
    """The error message about a folder that cannot be used.

    Args:
        key: the configuration key that names the folder.
        folder: the folder.
        what: `model`, `tokenizer` or `configuration`.
        reason: the message of the library that could not load it.
    """
    if is_file(folder):
        return f"{key}: {folder} is a file (expected: a Hugging Face {what} folder)"
    if not is_folder(folder):
        problem, reason = "does not exist", ""
    elif what == "model" and not has_config(folder):
        problem, reason = "holds no config.json", ""
    elif what == "tokenizer" and not has_tokenizer(folder):
        problem, reason = "holds no tokenizer.json; save the model's tokenizer there, too", ""
    else:
        problem = f"holds no {what} that can be loaded"
    text = f"{key}: the folder {folder} {problem} (expected: a Hugging Face {what} folder)"
    return f"{text}: {reason}" if reason else text


def is_file(path: Path) -> bool:
    """Like :meth:`Path.is_file`, which raises for some paths, such as one with a very long name."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Like :meth:`Path.is_dir`, which raises as well."""
    try:
        return path.is_dir()
    except OSError:
        return False
