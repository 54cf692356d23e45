"""Prepares the start of an engine: a new run, a resume from a checkpoint, or a fork."""

import os
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.config.settings import LIVE_SETTINGS, SettingChange, settings_of
from engine.errors import (
    DamagedCheckpointError,
    JournalError,
    NoSuchSessionError,
    SessionError,
    SessionNameError,
    UserInputError,
)
from engine.examined import examined
from engine.journal.fork import copy_until
from engine.journal.reader import JournalReader
from engine.journal.writer import AdoptedCheckpoint
from engine.launch.inputs import check_inputs
from engine.launch.rollout.engine import check_rollout_engine
from engine.launch.secret import check_secret
from engine.session.checkpoints import (
    AVERAGED_POLICY,
    checkpoint_path,
    complete_checkpoints,
    find_damage,
    read_summary,
    saved_settings,
)
from engine.session.folder import SessionFolder, check_name, check_path, create, free_name

START_VARIABLE = "RLHF_TUI_START"


class StartOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The start of an attempt."""

    from_step: int = 0
    """The checkpoint's step; 0 starts from the configuration's models."""
    fresh: bool = False
    """Discard the settings changed after that step (--from, fork, roll back)."""
    reseed: bool = False
    """Sample with other random numbers than the previous attempt from that step."""
    overrides: list[str] = []
    """`key=value`, applied to config.yaml."""
    changes: list[SettingChange] = []
    """The overrides of live settings, in force from the next step on."""
    who: str = ""
    """The operator, for the journal."""
    origin: dict[str, Any] = {}
    """For a fork: `from` (the parent session's name), `step`, and `ema` if it begins with the
    averaged policy."""


def start_variable(start: StartOptions) -> dict[str, str]:
    """The environment variable that passes its :class:`StartOptions` to an engine's process.

    An override may hold a secret, and a command line is visible to every user.
    """
    return {START_VARIABLE: msgspec.json.encode(start).decode()}


def received_start() -> StartOptions:
    """Reads the start and removes it from this process's environment, which the ranks inherit."""
    return msgspec.json.decode(os.environ.pop(START_VARIABLE), type=examined(StartOptions))


def checkpoint_steps(session: SessionFolder) -> list[int]:
    """The steps of all complete checkpoints on disk, in order."""
    return list(complete_checkpoints(session.checkpoints))


def timeline_checkpoints(session: SessionFolder) -> list[int]:
    """The steps of the complete checkpoints that a run can resume from: those of its timeline.

    A checkpoint of an abandoned branch is left out: the journal's steps before it are missing or
    belong to another branch.
    """
    with JournalReader(session) as reader:
        # `written` is enough: the COMPLETE file follows the journal's confirmation.
        known = {c.step for c in reader.checkpoints(("complete", "written"))}
    return [step for step in checkpoint_steps(session) if step in known]


def has_history(session: SessionFolder) -> bool:
    """Whether the session's journal holds an attempt; False if it is missing or empty."""
    with JournalReader(session) as reader:
        return bool(reader.attempts())


def is_new(session: SessionFolder, start: StartOptions) -> bool:
    """Whether the session was created for this start, and holds nothing but its configuration.

    Such a session is removed when the start fails because of the user's input. One whose journal
    is lost but which has checkpoints is not new.
    """
    return bool(start.origin) or not (
        session.journal_file.exists() or any(session.checkpoints.glob("step-*"))
    )


def is_failed_start(session: SessionFolder) -> bool:
    """Whether a session has ended without a step or a checkpoint of its own.

    Such a session does not block its name: nothing was trained in it. The copied steps and
    checkpoint of a fork do not count, because the session it was forked from still has them.
    """
    if session.is_live():
        return False
    with JournalReader(session) as reader:
        ended = reader.state() in ("failed", "crashed", "stopped")
        return ended and _has_trained_nothing(session, reader)


def _has_trained_nothing(session: SessionFolder, reader: JournalReader) -> bool:
    """Whether a session has been started, and has neither a step nor a checkpoint of its own."""
    attempts, origin = reader.attempts(), reader.fork_origin()
    first = origin.attempt if origin is not None else 1
    if not attempts or attempts[-1].attempt < first or reader.has_steps(first):
        return False
    copied = {checkpoint_path(session.checkpoints, origin.step)} if origin is not None else set()
    return set(session.checkpoints.glob("step-*")) <= copied


def create_session(root: Path, name: str | None, stem: str, config: RunConfig) -> SessionFolder:
    """Creates the session of a new run. It may replace a session that failed to start.

    Args:
        root: the folder of sessions.
        name: of the session; None for a free name.
        stem: what a free name begins with.
        config: of the run.

    Raises:
        ConfigError: a file that the configuration names is missing or of the wrong kind.
        UserInputError: the rollout engine is not installed, or a secret cannot be used.
        SessionNameError: the name is invalid or taken.
        SessionError: the folder cannot be created.
    """
    check_inputs(config)
    _check_machine(config)
    if name is not None:
        remove_failed_start(SessionFolder(root / check_name(name)))
        return create(root, name, config)
    while True:
        free = free_name(root, stem)
        try:
            return create(root, free, config)
        except SessionNameError:  # several starts at once choose the same free name
            if not (root / free).exists():
                raise


def _check_machine(config: RunConfig) -> None:
    """Checks what a run needs of this machine besides files. Raises UserInputError."""
    check_rollout_engine(config)
    check_secret(config)


def remove_failed_start(session: SessionFolder) -> None:
    """Removes a session if its start failed, so that another one can have its name.

    Raises:
        SessionError: the session belongs to another user.
    """
    if not session.folder.exists() or not is_failed_start(session):
        return
    held = session.acquire()
    try:
        # Another start may have replaced or resumed it meanwhile. Nobody runs it now.
        with JournalReader(session) as reader:
            failed = reader.meta().state != "finished" and _has_trained_nothing(session, reader)
        if failed:
            shutil.rmtree(session.folder, ignore_errors=True)
    finally:
        held.release()


def adopted_checkpoint(session: SessionFolder, step: int) -> AdoptedCheckpoint | None:
    """Describes a complete checkpoint that is missing from the journal.

    Returns:
        None if there is no such checkpoint, or the journal has it.
    """
    if step not in checkpoint_steps(session) or step in timeline_checkpoints(session):
        return None
    folder = checkpoint_path(session.checkpoints, step)
    numbers = read_summary(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return AdoptedCheckpoint(size=size, score=numbers.score, kl=numbers.kl)


def last_checkpoint(session: SessionFolder) -> int:
    """The step of the newest complete checkpoint of the timeline; 0 if there is none."""
    return max(timeline_checkpoints(session), default=0)


def earlier_checkpoint(session: SessionFolder, start: StartOptions) -> StartOptions | None:
    """The same start, but from the previous checkpoint, because its own is damaged.

    Returns:
        None if there is no earlier checkpoint of the timeline, or an operator chose the step.
    """
    earlier = [step for step in timeline_checkpoints(session) if step < start.from_step]
    if start.fresh or not earlier:
        return None
    return msgspec.structs.replace(start, from_step=earlier[-1])


def resumed_config(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The configuration of a resume.

    Raises:
        ConfigError: an override is wrong, or would change the model or the data's order.
    """
    new = config_file.override(config, overrides)
    config_file.check_resumable(config, new)
    return new


def forked_config(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The configuration of a fork.

    Raises:
        ConfigError: an override is wrong, or names a file that is missing.
    """
    new = config_file.override(config, overrides)
    config_file.check_forkable(config, new)
    check_inputs(new)
    return new


def resume(
    session: SessionFolder, *, from_step: int | None, reseed: bool, overrides: list[str], who: str
) -> StartOptions:
    """Prepares a resume from the last checkpoint, or from a chosen one, abandoning later steps.

    Raises:
        ConfigError: an override is wrong, or would change the model or the data's order.
        NoSuchSessionError: there is no checkpoint of that step.
        DamagedCheckpointError: that checkpoint is damaged.
        SessionError: the session belongs to another user, or its path is not valid UTF-8.
        UserInputError: there are checkpoints but no journal, and no step is chosen; the rollout
            engine is not installed, or a secret cannot be used.
    """
    session.check_owner()
    check_path(session.folder)
    old = session.config()
    new = resumed_config(old, overrides)
    _check_machine(new)
    if from_step is not None:
        _check_step(session, from_step)
        _check_whole(session, from_step)
    else:
        _check_history(session)
    return StartOptions(
        from_step=last_checkpoint(session) if from_step is None else from_step,
        fresh=from_step is not None,
        reseed=reseed,
        overrides=overrides,
        changes=_setting_changes(overrides, new, _settings_at(session, old, from_step)),
        who=who,
    )


def steps_done(session: SessionFolder, start: StartOptions) -> int | None:
    """The number of the run's steps if a resume would find all of them done, else None."""
    total = config_file.override(session.config(), start.overrides).train.steps
    with JournalReader(session) as reader:
        crashed = reader.state() == "crashed"
    # A session that crashed after its last checkpoint still has to record its end.
    return total if start.from_step >= total and not crashed else None


def fork(
    session: SessionFolder,
    name: str,
    *,
    from_step: int,
    reseed: bool,
    overrides: list[str],
    who: str,
    ema: bool = False,
) -> tuple[SessionFolder, StartOptions]:
    """Creates a session with a copy of another one's history up to a checkpoint.

    With `ema` it begins with the checkpoint's averaged policy; all else, the optimiser included, is
    that of the checkpoint.

    Raises:
        ConfigError: an override is wrong.
        NoSuchSessionError: there is no checkpoint of that step.
        SessionNameError: the new name cannot be used or is taken.
        UserInputError: no step is left to train, the checkpoint has no averaged policy, the rollout
            engine is not installed, or a secret cannot be used.
        SessionError: the files cannot be copied, or the session belongs to another user.
    """
    session.check_owner()
    old = session.config()
    new = forked_config(old, overrides)
    check_name(name)
    _check_step(session, from_step)
    if from_step >= new.train.steps:
        raise UserInputError(
            f"nothing would be trained: step {from_step} is the end of {new.train.steps} steps; "
            f"give the fork more: -o train.steps={2 * from_step}"
        )
    if ema:
        check_average(session, from_step)
    _check_machine(new)
    remove_failed_start(SessionFolder(session.folder.parent / name))
    child = create(session.folder.parent, name, new)
    try:
        _copy_history(session, child, from_step)
    except (OSError, sqlite3.Error, JournalError) as error:
        shutil.rmtree(child.folder, ignore_errors=True)
        _check_step(session, from_step)  # a live run may have removed it meanwhile
        raise SessionError(f"cannot copy {session.name} to {name}: {error}") from error
    changes = _setting_changes(overrides, new, _settings_at(session, old, from_step))
    return child, StartOptions(
        from_step=from_step,
        fresh=True,
        reseed=reseed,
        changes=changes,
        who=who,
        origin={"from": session.name, "step": from_step} | ({"ema": True} if ema else {}),
    )


def _copy_history(session: SessionFolder, child: SessionFolder, step: int) -> None:
    # Files of a checkpoint are never changed in place, so both sessions can share them.
    shutil.copytree(
        checkpoint_path(session.checkpoints, step),
        checkpoint_path(child.checkpoints, step),
        copy_function=_link_or_copy,
    )
    if session.tensorboard.is_dir():
        shutil.copytree(session.tensorboard, child.tensorboard)
    copy_until(session, child, step)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
    return target


def _check_history(session: SessionFolder) -> None:
    """Requires a journal: without one, a resume would start at step 0 and replace checkpoints."""
    steps = checkpoint_steps(session)
    if steps and not has_history(session):
        problem = "is empty" if session.journal_file.exists() else "is missing"
        raise UserInputError(
            f"session '{session.name}' has checkpoints (of steps {', '.join(map(str, steps))}) but "
            f"its journal {session.journal_file} {problem}; restore that file, or continue without "
            f"the history: {session.command('resume', '--from', str(steps[-1]))}"
        )


def _check_step(session: SessionFolder, step: int) -> None:
    steps = timeline_checkpoints(session) if has_history(session) else checkpoint_steps(session)
    if step not in steps:
        available = ", ".join(map(str, steps)) if steps else "none yet"
        raise NoSuchSessionError(
            f"session '{session.name}' has no checkpoint of step {step} (it has: {available})"
        )


def check_average(session: SessionFolder, step: int) -> None:
    """Checks that a checkpoint has an averaged policy. Raises UserInputError."""
    if not (checkpoint_path(session.checkpoints, step) / AVERAGED_POLICY).is_dir():
        raise UserInputError(
            f"--ema: the checkpoint of step {step} has no averaged policy; train with "
            "train.ema.decay to get one"
        )


def _check_whole(session: SessionFolder, step: int) -> None:
    """Checks a chosen checkpoint's files before the attempt abandons the steps after it."""
    folder = checkpoint_path(session.checkpoints, step)
    if problem := find_damage(folder):
        raise DamagedCheckpointError(
            f"the checkpoint {folder} is damaged: {problem}; nothing was changed, choose another "
            "step with --from"
        )


def _settings_at(session: SessionFolder, config: RunConfig, step: int | None) -> dict[str, Any]:
    """The settings of the step after a checkpoint; the latest ones if `step` is None."""
    configured = config_file.as_mapping(settings_of(config))
    if step is not None:
        return configured | saved_settings(checkpoint_path(session.checkpoints, step))
    with JournalReader(session) as reader:
        return configured | (reader.meta().settings or {})


def _setting_changes(
    overrides: Iterable[str], config: RunConfig, current: dict[str, Any]
) -> list[SettingChange]:
    """The overrides of live settings, which take precedence over the checkpoint's settings.

    One of a whole section, such as `kl={beta: 0.1}`, overrides all settings in it.
    """
    overridden = {o.partition("=")[0].strip() for o in overrides}
    configured = config_file.as_mapping(settings_of(config))
    return [
        SettingChange(key=key, old=current.get(key), new=configured[key])
        for key, path in LIVE_SETTINGS.items()
        if not overridden.isdisjoint((path, path.partition(".")[0]))
    ]
