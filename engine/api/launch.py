"""Starts runs, and finds sessions by name."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import starter
from engine.api.session import Session, default_operator
from engine.config import file as config_file
from engine.errors import NoSuchSessionError, UserInputError
from engine.launch import start as preparation
from engine.launch.background import start_or_remove
from engine.launch.start_options import StartOptions
from engine.session.command_line import sessions_folder
from engine.session.folder import SessionFolder, all_sessions, find
from engine.session.registry import live_sessions, names_of

LOADING_TIMEOUT = 60.0
"""Seconds to wait for errors while models load; loading continues after it."""

NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufffe\uffff]")
"""Characters valid in JSON that YAML rejects or reads as a line break."""

Overrides = Mapping[str, Any]
"""Configuration key → value, such as `{"kl.beta": 0.1}`."""


def start(
    config: str | Path | Mapping[str, Any],
    *,
    name: str | None = None,
    sessions: str | Path | None = None,
    overrides: Overrides | None = None,
    who: str | None = None,
    timeout: float = LOADING_TIMEOUT,
) -> Session:
    """Starts a run in the background. It outlives this process.

    Args:
        config: a YAML file, its content as nested mappings, or `starter:demo`. Relative paths in
            a mapping start at the current folder.
        name: of the session. Default: the file's name or `run`, with a number if that is taken.
        sessions: the folder of sessions. Default: $RLHF_TUI_SESSIONS or ./sessions.
        overrides: configuration keys that replace those of `config`.
        who: as for :class:`Session`.
        timeout: seconds to wait until the models are loaded. When it expires, loading continues,
            and an error appears in the session's state and message instead of an exception.

    Returns:
        The session; it is training unless the timeout expired.

    Raises:
        ConfigError: a key or a value is wrong, or a file it names is missing.
        SessionNameError: the name cannot be used or is taken.
        UserInputError: something that the configuration names cannot be used.
        SessionError: the run ended before the training began; the message is its reason.
    """
    words = _as_words(overrides)
    if isinstance(config, Mapping):
        stem, loaded = "run", config_file.from_mapping(config, Path.cwd(), words)
    else:
        path = Path(starter.resolve(str(config)))
        stem, loaded = path.stem, config_file.load(path, words)
    files = preparation.create_session(_root(sessions), name, stem, loaded)
    return _started(files, StartOptions(who=who or default_operator()), who, timeout)


def attach(
    name: str | None = None, *, sessions: str | Path | None = None, who: str | None = None
) -> Session:
    """Opens a session by name, live or ended; or the only live one.

    Args:
        name: of a session. Default: the only live one.
        sessions: the folder of sessions, and no other one. Default: $RLHF_TUI_SESSIONS or
            ./sessions, and this user's sessions that are live on this machine in any folder.
        who: as for :class:`Session`.

    Raises:
        NoSuchSessionError: there is no such session; or, without a name, none or several are live.
        SessionNameError: several live sessions elsewhere have this name; give `sessions`.
    """
    root = _root(sessions)
    if name is not None:
        return Session(find(root, name, () if sessions else live_sessions()).folder, who=who)
    live = [s for s in all_sessions(root) if s.is_live()] if sessions else live_sessions()
    if len(live) != 1:
        raise NoSuchSessionError(
            f"several sessions are live, give the name of one: {names_of(live)}"
            if live
            else "no session is live; give the name of one that has ended, or start one"
        )
    return Session(live[0].folder, who=who)


def sessions(folder: str | Path | None = None) -> list[Session]:
    """All sessions in a folder, sorted by name. Default: $RLHF_TUI_SESSIONS or ./sessions."""
    return [Session(files.folder) for files in all_sessions(_root(folder))]


def resume(
    session: Session | str,
    *,
    from_step: int | None = None,
    reseed: bool = False,
    overrides: Overrides | None = None,
    timeout: float = LOADING_TIMEOUT,
) -> Session:
    """Resumes a session that has ended, in the background.

    Args:
        session: the session or its name, as for :func:`attach`; it must have no live engine.
        from_step: the checkpoint's step; later steps become an abandoned branch. Default: the last
            checkpoint, and nothing is abandoned, unless a kill interrupted a roll back.
        reseed: whether to sample different responses than before.
        overrides: configuration keys that change, such as `{"train.steps": 200}`.
        timeout: as for :func:`start`.

    Returns:
        The same session.

    Raises:
        ConfigError: an override is wrong, or would change the model or the data's order.
        NoSuchSessionError: there is no such session, or no checkpoint of that step.
        SessionLockedError: the session has a live engine.
        UserInputError: all its steps are done, and `train.steps` was not raised.
        CheckpointError: the chosen checkpoint is damaged.
        SessionError: the run ended before the training began, or belongs to another user.
    """
    session = _opened(session)
    files, words = session.files, _as_words(overrides)
    options = preparation.resume(
        files, from_step=from_step, reseed=reseed, overrides=words, who=session.who
    )
    if (total := preparation.steps_done(files, options)) is not None:
        raise UserInputError(
            f"session '{session.name}' has finished its {total} steps; to extend it, give "
            f"overrides={{'train.steps': {2 * options.from_step}}}"
        )
    return _started(files, options, session.who, timeout)


def fork(
    session: Session | str,
    name: str,
    *,
    from_step: int,
    reseed: bool = False,
    ema: bool = False,
    overrides: Overrides | None = None,
    timeout: float = LOADING_TIMEOUT,
) -> Session:
    """Forks a new session from a checkpoint of another, and starts it in the background.

    Args:
        session: the session or its name, as for :func:`attach`; live or ended, it is not changed.
        name: of the new session, in the same folder.
        from_step: the checkpoint's step.
        reseed: whether to sample different responses than the other session did.
        ema: whether to start from the averaged policy of `train.ema`.
        overrides: configuration keys that differ.
        timeout: as for :func:`start`.

    Returns:
        The new session.

    Raises:
        ConfigError: an override is wrong.
        NoSuchSessionError: there is no such session, or no checkpoint of that step.
        SessionNameError: the new name cannot be used or is taken.
        UserInputError: the checkpoint has no averaged policy.
        SessionError: the files cannot be copied, the session belongs to another user, or the run
            ended before the training began.
    """
    session = _opened(session)
    child, options = preparation.fork(
        session.files,
        name,
        from_step=from_step,
        reseed=reseed,
        overrides=_as_words(overrides),
        who=session.who,
        ema=ema,
    )
    return _started(child, options, session.who, timeout)


def _opened(session: Session | str) -> Session:
    return attach(session) if isinstance(session, str) else session


def _started(
    files: SessionFolder, options: StartOptions, who: str | None, timeout: float
) -> Session:
    start_or_remove(files, options, timeout=timeout)
    return Session(files.folder, who=who)


def _root(folder: str | Path | None) -> Path:
    return (Path(folder) if folder else sessions_folder()).resolve()


def _as_words(overrides: Overrides | None) -> list[str]:
    """Overrides in the form of the command line: JSON, which is YAML. Raises UserInputError."""
    try:
        return [f"{key}={_as_yaml(value)}" for key, value in (overrides or {}).items()]
    except (TypeError, ValueError) as error:
        raise UserInputError(f"overrides must be plain values: {error}") from error


def _as_yaml(value: Any) -> str:
    # With ASCII only, JSON would escape an emoji as two surrogates, which YAML does not combine.
    text = json.dumps(value, ensure_ascii=False)
    return NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
