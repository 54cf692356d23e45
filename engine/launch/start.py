"""Prepares the start of an engine: a new run, a resume from a checkpoint, or a fork."""

import contextlib
import errno
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
    SessionError,
    SessionNameError,
    UserInputError,
)
from engine.journal.fork import PART_NAME, copy_until, unfinished_copies
from engine.journal.reader import JournalReader
from engine.launch.failed_start import remove_failed_start
from engine.launch.inputs import check_inputs
from engine.launch.rollout.engine import check_rollout_engine
from engine.launch.secret import check_secret
from engine.launch.start_checkpoints import (
    all_lost,
    check_average,
    check_step,
    checkpoint_steps,
    has_history,
    last_checkpoint,
    resumable_checkpoints,
    timeline_checkpoints,
    unfinished_rollback,
)
from engine.launch.start_options import StartOptions
from engine.session.access import create_file
from engine.session.checkpoints import (
    COMPLETE,
    checkpoint_path,
    find_damage,
    saved_settings,
)
from engine.session.folder import SessionFolder, check_name, check_path, create, free_name


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

    If the engine was killed after a roll back was applied, the resume carries it out.

    Raises:
        ConfigError: an override is wrong, or would change the model or the data's order.
        NoSuchSessionError: there is no checkpoint of that step.
        DamagedCheckpointError: that checkpoint is damaged.
        SessionLockedError: the session has a live engine.
        SessionError: the session belongs to another user, or its path is not valid UTF-8.
        UserInputError: there are checkpoints but no journal, or a journal with checkpoints of which
            none is there, and no step is chosen; the rollout engine is not installed, or a secret
            cannot be used.
    """
    session.check_owner()
    check_path(session.folder)
    after_attempt = _last_attempt(session)
    old = session.config()
    new = resumed_config(old, overrides)
    _check_machine(new)
    if from_step is not None:
        check_step(session, from_step, resumable_checkpoints(session))
        _check_whole(session, from_step)
    else:
        _check_history(session)
        if problem := all_lost(session):
            raise UserInputError(problem)
        if (rollback := unfinished_rollback(session)) is not None:
            from_step, reseed = rollback.step, reseed or rollback.reseed
    return StartOptions(
        from_step=last_checkpoint(session) if from_step is None else from_step,
        fresh=from_step is not None,
        reseed=reseed,
        after_attempt=after_attempt,
        overrides=overrides,
        changes=_setting_changes(overrides, new, _settings_at(session, old, from_step)),
        who=who,
    )


def _last_attempt(session: SessionFolder) -> int:
    """The number of the last attempt of a session without an engine; 0 if there is none.

    An engine that starts later begins an attempt, so it can be told that one ran meanwhile.

    Raises:
        SessionLockedError: the session has a live engine.
    """
    lock = session.acquire()
    try:
        with JournalReader(session) as reader:
            return max((a.attempt for a in reader.attempts()), default=0)
    finally:
        lock.release()


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
    lock = child.acquire()  # what is half a copy must neither be resumed nor deleted
    try:
        _copy_history(session, child, from_step)
    except BaseException as error:
        with contextlib.suppress(OSError):
            child.config_file.unlink()  # first: what may be left is no session then
        lock.release()  # on NFS an open file keeps its folder from being removed
        shutil.rmtree(child.folder, ignore_errors=True)
        if not isinstance(error, OSError | sqlite3.Error | JournalError):  # such as ctrl+c
            raise
        _check_step(session, from_step)  # a live run may have removed it meanwhile
        # An error of `copytree` lists those of all files.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise SessionError(f"cannot copy {session.name} to {name}: {reason}") from error
    finally:
        lock.release()
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
    part = child.folder / PART_NAME
    create_file(part)  # shows that this was interrupted, see `_check_history`
    # Files of a checkpoint are never changed in place, so both sessions can share them.
    source = checkpoint_path(session.checkpoints, step)
    shutil.copytree(source, checkpoint_path(child.checkpoints, step), copy_function=_link_or_copy)
    if not (source / COMPLETE).exists():  # a deletion begins with it: files may be missing
        raise FileNotFoundError(errno.ENOENT, "the checkpoint was deleted", str(source))
    if session.tensorboard.is_dir():
        shutil.copytree(session.tensorboard, child.tensorboard)
    copy_until(session, child, step)
    part.unlink(missing_ok=True)  # if the source has no journal


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
    return target


def _check_history(session: SessionFolder) -> None:
    """Requires a journal: without one, a resume would start at step 0 and replace checkpoints.

    So it would after a fork that was killed while it copied its checkpoint.
    """
    steps, known = checkpoint_steps(session), has_history(session)
    if not steps and not known and unfinished_copies(session):
        raise UserInputError(
            f"session '{session.name}' is a fork whose files were not copied to the end: delete it "
            f"({session.command('rm')}) and fork again"
        )
    if steps and not known:
        problem = "is empty" if session.journal_file.exists() else "is missing"
        raise UserInputError(
            f"session '{session.name}' has checkpoints (of steps {', '.join(map(str, steps))}) but "
            f"its journal {session.journal_file} {problem}; restore that file, or continue without "
            f"the history: {session.command('resume', '--from', str(steps[-1]))}"
        )


def _check_step(session: SessionFolder, step: int) -> None:
    steps = timeline_checkpoints(session) if has_history(session) else checkpoint_steps(session)
    check_step(session, step, steps)


def _check_whole(session: SessionFolder, step: int) -> None:
    """Checks a chosen checkpoint's files before the attempt abandons the steps after it."""
    folder = checkpoint_path(session.checkpoints, step)
    try:
        problem = find_damage(folder)
    except OSError as error:
        raise SessionError(
            f"the checkpoint {folder} cannot be read: {error}; nothing was changed"
        ) from error
    if problem:
        raise DamagedCheckpointError(
            f"the checkpoint {folder} is damaged: {problem}; nothing was changed, choose another "
            "step with --from"
        )


def _settings_at(session: SessionFolder, config: RunConfig, step: int | None) -> dict[str, Any]:
    """The settings of the step after a checkpoint; the latest ones if `step` is None."""
    configured = msgspec.structs.asdict(settings_of(config))
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
    configured = msgspec.structs.asdict(settings_of(config))
    return [
        SettingChange(key=key, old=current.get(key), new=configured[key])
        for key, path in LIVE_SETTINGS.items()
        if not overridden.isdisjoint((path, path.partition(".")[0]))
    ]
