"""The secret by which the machines of a run authenticate each other.

Whoever starts the run passes it in the environment, or in a file that only its owner can read.
Otherwise the first machine writes a random one into the session's folder, which all machines share.
It is never on a command line, which every user of a machine can read, and never in the
configuration or the journal, which are copied and passed around.
"""

import os
import secrets
import stat
from pathlib import Path

from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.session.folder import SessionFolder, write_atomically

SECRET_VARIABLE = "RLHF_TUI_SECRET"  # noqa: S105 - the name of a variable
SECRET_FILE_VARIABLE = "RLHF_TUI_SECRET_FILE"  # noqa: S105 - the name of a variable
MIN_CHARACTERS = 16
"""Whoever records a connection could find a shorter secret by brute force."""
HOW_TO_MAKE_ONE = "make one with: openssl rand -hex 32"


def read_secret(file: Path | None = None) -> str | None:
    """The secret that was passed to this process.

    Args:
        file: the file that holds it; by default the environment decides.

    Returns:
        None if there is none: no file, and nothing in the environment.

    Raises:
        UserInputError: other users can read the file, or the secret is too short.
    """
    if file is None:
        if secret := os.environ.get(SECRET_VARIABLE, ""):
            return _checked(secret, SECRET_VARIABLE)
        named = os.environ.get(SECRET_FILE_VARIABLE, "")
        if not named:
            return None
        file = Path(named)
        if not file.exists():
            raise UserInputError(f"{SECRET_FILE_VARIABLE}: there is no file {file}")
    try:
        with file.open(encoding="utf-8") as opened:
            found = os.fstat(opened.fileno())
            text = opened.read(4096)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"cannot read the secret in {file}: {error}") from error
    if found.st_uid not in (os.geteuid(), 0):
        raise UserInputError(f"the file {file} of the secret belongs to another user")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserInputError(
            f"the secret in {file} can be read by other users: chmod 600 it, and change the secret"
        )
    return _checked(text, str(file))


def secret_of_run(session: SessionFolder) -> str:
    """The secret on the first machine; created and written into the session if none was passed.

    Raises:
        UserInputError: as in :func:`read_secret`.
        OSError: the file cannot be written.
    """
    if secret := read_secret():
        return secret
    secret = secrets.token_hex(32)
    write_atomically(session.secret_file, secret)
    return secret


def _checked(secret: str, where: str) -> str:
    secret = secret.strip()
    if len(secret) < MIN_CHARACTERS:
        raise UserInputError(
            f"{where}: the secret has fewer than {MIN_CHARACTERS} characters; {HOW_TO_MAKE_ONE}"
        )
    return secret


def needs_secret(config: RunConfig) -> bool:
    """Whether other machines take part in a run, as ranks or to generate."""
    joined = config.rollout.joined if config.rollout.uses_vllm else 0
    return config.launch.nodes > 1 or joined > 0


def check_secret(config: RunConfig) -> None:
    """Raises UserInputError if a run over several machines was handed a secret it cannot use."""
    if needs_secret(config):
        read_secret()
