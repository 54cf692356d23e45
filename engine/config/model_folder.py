"""Error messages about a model's folder, with one wording for all callers."""

from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt",
)  # fmt: skip
"""The files of tokenizers: a folder with one of almost any kind holds one of them."""


def has_config(folder: Path) -> bool:
    """Whether a folder holds the configuration of a Hugging Face model."""
    return is_file(folder / "config.json")


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
    if not folder.is_dir():
        problem, reason = "does not exist", ""
    elif what == "model" and not has_config(folder):
        adapters = is_file(folder / "adapter_config.json")
        problem, reason = "holds no config.json", ""
        if adapters:
            problem = "holds adapters without their model; export it with --merged"
    elif what == "tokenizer" and not any(is_file(folder / name) for name in TOKENIZER_FILES):
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
