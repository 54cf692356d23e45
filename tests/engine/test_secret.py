"""Where the secret of a run comes from, and which secrets are refused."""

import pytest

from engine.errors import UserInputError
from engine.launch.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE, read_secret, secret_of_run
from engine.session.folder import SessionFolder

SECRET = "f" * 32


@pytest.fixture(autouse=True)
def nothing_handed_over(monkeypatch):
    for name in (SECRET_VARIABLE, SECRET_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def test_the_environment_or_a_file_has_it(file, monkeypatch):
    assert read_secret() is None
    assert read_secret(file) == SECRET
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(file))
    assert read_secret() == SECRET
    monkeypatch.setenv(SECRET_VARIABLE, "e" * 16)
    assert read_secret() == "e" * 16


def test_a_file_that_does_not_exist_yet_has_none(tmp_path):
    assert read_secret(tmp_path / "later") is None


def test_a_file_that_the_environment_names_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv(SECRET_FILE_VARIABLE, str(tmp_path / "typo"))
    with pytest.raises(UserInputError, match="no file"):
        read_secret()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused_without_repeating_the_secret(file, mode):
    file.chmod(mode)
    with pytest.raises(UserInputError, match="chmod 600") as caught:
        read_secret(file)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("secret", ["", "short", "   short   \n"])
def test_a_secret_that_could_be_found_by_trying_is_refused(file, secret):
    file.write_text(secret)
    with pytest.raises(UserInputError, match="fewer than 16 characters") as caught:
        read_secret(file)
    assert not secret.strip() or secret.strip() not in str(caught.value)


def test_without_one_the_first_machine_writes_a_random_one_that_only_its_owner_can_read(tmp_path):
    session = SessionFolder(tmp_path)
    first = secret_of_run(session)
    assert read_secret(session.secret_file) == first
    assert session.secret_file.stat().st_mode & 0o777 == 0o600
    assert secret_of_run(session) != first


def test_one_that_was_handed_over_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    session = SessionFolder(tmp_path)
    assert secret_of_run(session) == SECRET
    assert not session.secret_file.exists()
