"""A user's function is looked for before a run starts, without importing its module."""

import pytest

from engine.errors import ConfigError
from engine.launch.function_lookup import check_function


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, which is not the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "rewards.py").write_text(
        """
raise SystemExit("imported")
def score(completions): ...
async def later(completions): ...
by_name = score
from math import sqrt as root
if True:
    def hidden(completions): ...
"""
    )
    (tmp_path / "dynamic.py").write_text("globals()['score'] = len")
    (tmp_path / "passed_on.py").write_text("from rewards import *")
    (tmp_path / "lazy.py").write_text("def __getattr__(name): return len")
    (tmp_path / "broken.py").write_text("x = 1\ndef score(:\n")
    (tmp_path / "package" / "inner").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "inner" / "rewards.py").write_text("def score(completions): ...")
    return tmp_path


@pytest.mark.parametrize(
    "function",
    [
        "rewards:score", "rewards:later", "rewards:by_name", "rewards:root", "rewards:hidden",
        "dynamic:score", "passed_on:score", "lazy:score", "package.inner.rewards:score",
        "json:loads", "os.path:join", "sys:exit", "__main__:f", "numpy.linalg:norm",
    ],
)  # fmt: skip
def test_what_may_exist_passes(folder, function):
    check_function("reward.function", function, str(folder))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent:score", r"no module 'absent' in .* or .*elsewhere, and none with this name is"),
        ("rewards:scores", r"rewards\.py has no function 'scores'; did you mean 'rewards:score'\?"),
        ("package.inner.absent:score", "no module 'package.inner.absent'"),
        ("broken:score", r"broken\.py, line 2: "),
        ("rewards.py:score", "the name of a module, not of a file: rewards:score$"),
        ("a/rewards.py:score", "not of a file: rewards:score and reward.path=a$"),
    ],
)
def test_what_cannot_exist_is_named(folder, function, message):
    with pytest.raises(ConfigError, match=f"^reward.function.*{message}"):
        check_function("reward.function", function, str(folder))


def test_the_working_directory_is_searched_too(folder):
    (folder / "elsewhere" / "here.py").write_text("def score(completions): ...")
    check_function("reward.function", "here:score", None)
