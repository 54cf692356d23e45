"""How each experiment tracker of accelerate begins a run, and continues it in a later attempt.

Source: `accelerate.tracking`, whose classes pass their keyword arguments to the packages. The
arguments are those in the packages' documentation.
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
    """What a tracker gets to know about the run."""

    trackers: list[str]
    project: str
    session: str
    """The session's name, which the tracker's run gets."""
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
    """Returns the arguments of its class, given the id, or "" if there is none yet."""
    new_id: Callable[[Header], str] = _none
    """Chooses the id of a new run; returns "" if the tracker chooses it."""
    read_id: Callable[[Any], str] | None = None
    """Returns the id that the tracker has chosen, from the tracker's run."""


def _folder() -> str:
    """The session's folder for trackers, in which the program runs."""
    return str(Path.cwd())


KINDS = {
    "wandb": TrackerKind(
        lambda h, i: (
            (h.project,), {"id": i, "name": h.session, "resume": "allow", "dir": _folder()}
        ),
        _random(16),
    ),
    "trackio": TrackerKind(  # the name of a run is its id
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
    """Whether a value is a class of accelerate's trackers."""
    return isinstance(value, type) and issubclass(value, GeneralTracker)


def make_tracker(name: str, header: Header, known: str) -> tuple[GeneralTracker, Callable[[], str]]:
    """Creates a tracker that begins a run, or continues one.

    Args:
        name: a key of :data:`KINDS`, or `module:Class`. Such a class is called with the project,
            the folder if it asks for one, and the keywords `run_name` and `run_id`, which is the
            same in every attempt.
        header: what it gets to know about the run.
        known: the id of the run to continue; "" to begin one.

    Returns:
        The tracker, not started yet, and a function that returns the run's id after the start.

    Raises:
        Exception: any error of importing or creating it.
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
