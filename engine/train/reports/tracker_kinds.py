"""How each experiment tracker of accelerate begins a run, and continues it in a later attempt.

Source: accelerate's `accelerate.tracking`, whose classes pass their keywords to the packages; the
keywords are those of the packages' own documentation.
"""

import importlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker


class Header(msgspec.Struct, frozen=True):
    """What a tracker is given of the run."""

    trackers: list[str]
    project: str
    session: str
    """The session's name, for the run."""
    config: dict[str, Any]
    """The configuration, flat, without secrets."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _random(length: int) -> Callable[[Header], str]:
    return lambda _header: uuid.uuid4().hex[:length]


def _none(_header: Header) -> str:
    return ""


@dataclass(frozen=True)
class TrackerKind:
    """One of accelerate's trackers."""

    arguments: Callable[[Header, str], Arguments]
    """The arguments of its class, from the id: "" if there is none yet."""
    new_id: Callable[[Header], str] = _none
    """Chooses the id of a new run; "" if the tracker does that."""
    read_id: Callable[[Any], str] | None = None
    """The id that the tracker has chosen, from its run."""


def _folder() -> str:
    """The session's folder of trackers, in which the program runs."""
    return str(Path.cwd())


KINDS = {
    "wandb": TrackerKind(
        lambda h, i: (
            (h.project,), {"id": i, "name": h.session, "resume": "allow", "dir": _folder()}
        ),
        _random(16),
    ),
    "trackio": TrackerKind(  # a run's name is its id
        lambda h, i: ((h.project,), {"name": i, "resume": "allow"}),
        lambda h: f"{h.session}-{uuid.uuid4().hex[:8]}",
    ),
    "swanlab": TrackerKind(
        lambda h, i: (
            (h.project,),
            {"id": i, "experiment_name": h.session, "resume": "allow", "logdir": _folder()},
        ),
        _random(21),
    ),
    "comet_ml": TrackerKind(lambda h, i: ((h.project,), {"experiment_key": i}), _random(32)),
    "mlflow": TrackerKind(
        lambda h, i: ((h.project,), {"run_id": i or None, "run_name": h.session}),
        read_id=lambda run: str(run.info.run_id),
    ),
    "aim": TrackerKind(
        lambda h, i: ((h.session, _folder()), {"experiment": h.project, "run_hash": i or None}),
        read_id=lambda run: str(run.hash),
    ),
    "clearml": TrackerKind(
        lambda h, i: (
            (h.project,),
            {"task_name": h.session, "continue_last_task": i or False,
             "reuse_last_task_id": False},
        ),
        read_id=lambda task: str(task.id),
    ),
    "dvclive": TrackerKind(
        lambda _h, i: ((), {"dir": f"{_folder()}/dvclive", "resume": bool(i)}), _random(16)
    ),
    "tensorboard": TrackerKind(lambda h, _i: ((h.session, _folder()), {}), _random(16)),
}  # fmt: skip


def is_tracker(value: Any) -> bool:
    """Whether a value is a class of trackers."""
    return isinstance(value, type) and issubclass(value, GeneralTracker)


def make_tracker(name: str, header: Header, known: str) -> tuple[GeneralTracker, Callable[[], str]]:
    """A tracker that begins a run, or continues one.

    Args:
        name: a key of :data:`KINDS`, or `module:Class`. Such a class is called with the project,
            the folder if it asks for one, and the keywords `run_name` and `run_id`, which is the
            same in every attempt.
        header: what it is given of the run.
        known: the id of the run to continue; "" to begin one.

    Returns:
        The tracker, which is not started, and a function that returns the run's id once it is.

    Raises:
        Exception: whatever importing or making it raises.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        own: Any = getattr(importlib.import_module(module), attribute)
        if not is_tracker(own):
            raise TypeError(f"{attribute} is not a subclass of accelerate.tracking.GeneralTracker")
        folder = [_folder()] if own.requires_logging_directory else []
        chosen = known or uuid.uuid4().hex
        made = own(header.project, *folder, run_name=header.session, run_id=chosen)
        return made, lambda: chosen
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError("this version of accelerate has no such tracker")
    kind = KINDS[name]
    run_id = known or kind.new_id(header)
    positional, keywords = kind.arguments(header, run_id)
    tracker = LOGGER_TYPE_TO_CLASS[name](*positional, **keywords)
    read = kind.read_id
    return tracker, lambda: run_id if read is None else read(tracker.tracker)
