"""Reads the rows of a data set: a file, a folder, or a data set on the hub."""

import errno
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from engine import starter
from engine.config.paths import DATA_FILES
from engine.config.sections.model import PromptSource
from engine.errors import UserInputError, error_text, first_line

if TYPE_CHECKING:
    import datasets

MAX_NESTING = 50
"""Levels of lists and objects in a line of JSON; `datasets` fails from about 60 on."""
JSON_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]')
"""Matches brackets, and strings, because these may contain brackets."""
ROW = re.compile(r" in row \d+$")
"""The end of pyarrow's error about a line of JSON. It counts from 0 in each block that it reads."""
ONE_OBJECT = 'each line must be one object, such as {"prompt": "..."}'
ONE_LIST = 'write a list of objects, such as [{"prompt": "..."}], or one object a line'
COMMA = f"ends with a comma; {ONE_OBJECT}"
SAVED_SPLITS = "dataset_dict.json"
"""Names the splits in a folder that `save_to_disk` has written of several."""
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def local_file(source: PromptSource) -> Path | None:
    """Returns the file of a data set; None for a folder, or one on the hub.

    Raises:
        UserInputError: there is no such file, or it is empty.
    """
    path = Path(starter.resolve(source.path))
    if path.suffix.lower() not in DATA_FILES or path.is_dir():
        return None
    if not path.is_file():
        raise UserInputError(f"data.prompts: no file at {path}")
    if path.stat().st_size == 0:
        raise UserInputError(f"data.prompts: {path} is empty; give at least one prompt")
    return path


def read_rows(source: PromptSource, work: Path | None = None) -> "datasets.Dataset":
    """Reads a data set, which has at least one row.

    Args:
        source: the data set.
        work: folder for the copy of a file, from which the rows are memory-mapped. Without it,
            they are in memory. A data set on the hub, or one of several files in a folder, is
            mapped from the cache of `datasets`.

    Raises:
        UserInputError: it cannot be read, or has no rows.
    """
    # Imported here: pandas and pyarrow take about a second, and only rank 0 needs them.
    import datasets  # noqa: PLC0415

    file = local_file(source)
    name = starter.resolve(source.path)
    kind = None if file is None else DATA_FILES[file.suffix.lower()]
    if file is not None and kind == "json":
        _check_nesting(file)
    datasets.disable_progress_bars()
    try:
        if kind is None and is_saved_data_set(Path(name)):
            data = _saved_rows(name, source.split)
        elif kind is None:
            data = datasets.load_dataset(name, split=source.split)
        elif work is not None:
            data = datasets.load_dataset(kind, data_files=name, split="train", cache_dir=str(work))
        else:
            # The cache of `datasets` is in the home folder, which may not be writable, and would
            # keep a copy of each version of the file.
            with TemporaryDirectory(prefix="rlhf-tui-") as folder:
                data = datasets.load_dataset(
                    kind, data_files=name, split="train", cache_dir=folder, keep_in_memory=True
                )
    except MemoryError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets raise almost any type
        raise UserInputError(_read_error(name, kind, error)) from error
    if not len(data):
        raise UserInputError(f"data.prompts: {name} holds no rows; give at least one prompt")
    return data


def is_saved_data_set(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the library `datasets`."""
    return any((folder / file).is_file() for file in (SAVED_SPLITS, "state.json"))


def _saved_rows(folder: str, split: str | None) -> "datasets.Dataset":
    """The rows that `save_to_disk` has written; of several splits, those of one."""
    import datasets  # noqa: PLC0415 - as above

    saved = datasets.load_from_disk(folder)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"no split '{split}'; it has {', '.join(saved)}")
    return saved[split]


def _check_nesting(source: Path) -> None:
    """Refuses JSON that is nested deeply, on which `datasets` would take minutes to fail.

    Only lines with many brackets are parsed, so that some gigabytes take a second.

    Raises:
        UserInputError: a line is nested deeper than :data:`MAX_NESTING`, or cannot be read.
    """
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.count(b"[") + line.count(b"{") <= MAX_NESTING:
                    continue
                depth = 0
                for token in JSON_TOKENS.finditer(line):
                    depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
                    if depth > MAX_NESTING:
                        raise UserInputError(
                            f"data.prompts: line {number} of {source} is nested more than "
                            f"{MAX_NESTING} levels deep"
                        )
    except OSError as error:
        raise UserInputError(f"data.prompts: cannot read {source}: {error.strerror}") from error


def _read_error(source: str, kind: str | None, error: Exception) -> str:
    if "corresponds to no data" in error_text(error):  # said by `datasets` of no rows
        return f"data.prompts: {source} holds no rows; give at least one prompt"
    first = first_line(error.__cause__ or error)
    if kind is None:
        folder = Path(source).is_dir()
        if (unwritable := _unwritable(error)) is not None:
            what = "a folder" if folder else "a data set on the hub"
            return (
                f"data.prompts: '{source}' is {what}, whose cache cannot be written "
                f"({unwritable}); set HF_HOME to a folder that you can write"
            )
        if folder:
            return f"data.prompts: cannot read the folder {source}: {first}"
        endings = ", ".join(DATA_FILES)
        return (
            f"data.prompts: '{source}' is neither a local file ({endings}), a folder, nor a data "
            f"set that the hub provides: {first}"
        )
    if kind == "json":
        first = _json_problem(Path(source)) or ROW.sub("", first)
    return f"data.prompts: cannot read {source} as {kind}: {first}"


def _json_problem(file: Path) -> str | None:
    """What is wrong with a file of JSON: one object a line, or a single value over all lines.

    None if Python finds nothing wrong.
    """
    lines_expected = file.suffix.lower() == ".jsonl"
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if number == 1 and not lines_expected and line.lstrip().startswith(b"["):
                return _value_problem(file)
            problem = _not_an_object(line)
            if problem is not None:
                if number == 1 and not lines_expected and problem != COMMA:
                    return _value_problem(file)
                return f"line {number} {problem}"
    return None


def _value_problem(file: Path) -> str | None:
    """What is wrong with a file that holds a single value; None if Python finds nothing wrong."""
    try:
        value = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is not JSON ({_where(error)}); {ONE_LIST}"
    except UnicodeDecodeError as error:
        return f"it is not text in UTF-8 ({error.reason})"
    except RecursionError:
        return "it is nested too deeply"
    if not isinstance(value, list):
        return None if isinstance(value, dict) else f"it is no list; {ONE_LIST}"
    number = next((n for n, row in enumerate(value, start=1) if not isinstance(row, dict)), None)
    return None if number is None else f"entry {number} of its list is not an object; {ONE_LIST}"


def _where(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _not_an_object(line: bytes) -> str | None:
    """Why a line is not a JSON object, to follow "line 3"; None if it is one."""

    def check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"has the key '{twice}' twice")
        return dict(pairs)

    try:
        value = json.loads(line.rstrip(), object_pairs_hook=check_keys)
    except json.JSONDecodeError as error:
        if line.rstrip().endswith(b",") and _not_an_object(line.rstrip()[:-1]) is None:
            return COMMA
        return f"is not JSON ({_where(error)}); {ONE_OBJECT}"
    except UnicodeDecodeError as error:
        return f"is not text in UTF-8 ({error.reason})"
    except ValueError as error:
        return str(error)
    return None if isinstance(value, dict) else f"is not an object; {ONE_OBJECT}"


def _unwritable(error: BaseException) -> str | None:
    """The system's message about a file or folder that cannot be written, else None."""
    cause: BaseException | None = error
    while cause is not None:
        # Without a file name it is another error: a firewall refuses connections with EACCES, too.
        if isinstance(cause, OSError) and cause.errno in NOT_WRITABLE and cause.filename:
            return first_line(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def decode_rows(rows: "datasets.Dataset", source: PromptSource) -> list[dict[str, Any]]:
    """Converts rows to Python values.

    Args:
        rows: all rows of a data set, or some.
        source: the data set, for the error message.

    Raises:
        UserInputError: a text is not UTF-8.
    """
    try:
        return list(rows.to_list())
    except MemoryError:
        raise
    except Exception as error:  # pyarrow and datasets raise almost any type
        name = starter.resolve(source.path)
        kind = DATA_FILES.get(Path(name).suffix.lower())
        raise UserInputError(_read_error(name, kind, error)) from error
