"""Commands that are typed wrongly: the message says what may be meant, in plain words."""

import click
import pytest
from click.testing import CliRunner

from rlhf_tui.cli import cli, in_plain_words


def usage_error(arguments):
    """The message for wrong usage."""
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert isinstance(result.exception, click.UsageError)
    message = in_plain_words(result.exception.format_message())
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("word", "hint"),
    [("statu", "; did you mean 'status'?"), ("unpause", "; to steer a run, type rlhf-tui ctl NAME "
      "unpause"), ("frobnicate", "")],
)  # fmt: skip
def test_a_command_that_does_not_exist_names_the_one_that_may_be_meant(word, hint):
    with pytest.raises(click.UsageError) as caught:
        cli.main([word], standalone_mode=False)
    assert caught.value.message == f"no command '{word}'{hint}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["metrics", "frozen", "--last", "x"], "'x' is not a whole number."),
        (["metrics", "frozen", "--last", "0"], "0 is less than 1."),
        (["ctl", "frozen", "beta", "high"], "'high' is not a number."),
    ],
)
def test_a_wrong_number_is_told_in_plain_words(arguments, words):
    assert usage_error(arguments).endswith(words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ctl"], "Missing argument 'NAME'."),
        (["reward"], "Missing command."),
        (["notify"], "Missing command."),
        (["completion"], "Choose from: bash, zsh, fish"),
    ],
)
def test_a_command_without_its_arguments_is_told_in_one_line(arguments, words):
    assert usage_error(arguments).endswith(words)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("rollbak", "no verb 'rollbak'; did you mean 'rollback'?"),
        ("learning_rate", "; to change this setting: rlhf-tui ctl frozen set learning_rate=VALUE"),
        ("ppo.epochs=2", "; to change this setting: rlhf-tui ctl frozen set epochs=VALUE"),
        ("faster", "no verb 'faster'; there are pause, unpause, checkpoint, undo"),
    ],
)
def test_a_verb_that_does_not_exist_names_what_may_be_meant(word, hint):
    assert hint in usage_error(["ctl", "frozen", word, "1e-5"])


def test_a_hint_for_a_session_of_another_folder_names_the_folder(tmp_path):
    words = usage_error(["ctl", "--sessions", str(tmp_path), "frozen", "clip_range", "0.1"])

    assert f"rlhf-tui ctl frozen set clip_range=VALUE --sessions {tmp_path}" in words
