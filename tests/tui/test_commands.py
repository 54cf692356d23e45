"""What holds for all commands of the shell: the folder, who sits there, who is asked."""

import getpass
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from engine import starter
from engine.config import file as config_file
from engine.errors import ConfigError, NoSuchSessionError, SessionError
from engine.journal.reader import JournalReader
from engine.protocol.commands import COMMANDS
from engine.session.checkpoints import aside_path, checkpoint_path, complete_checkpoints
from engine.session.folder import create
from rlhf_tui import identity
from rlhf_tui.cli import MODULES, cli
from rlhf_tui.commands.options import existing
from rlhf_tui.commands.steer import ctl
from rlhf_tui.format import plural

DEADLINE = 240.0


def test_the_commands_of_ctl_are_described_whole():
    printed = CliRunner().invoke(cli, ["ctl", "--help"]).output
    for kind in COMMANDS.values():
        if kind.name() in ctl.commands:
            assert kind.summary in " ".join(printed.split())


@pytest.mark.parametrize(
    ("options", "indices"), [((), list(range(8))), (("--last", "2"), [6, 7]), (("--eval",), [])]
)
def test_the_responses_of_one_step_are_printed(root, options, indices):
    arguments = ["samples", "frozen", "--step", "150", *options, "--sessions", str(root), "--json"]
    rows = json.loads(CliRunner().invoke(cli, arguments).output)
    assert [(row["step"], row["index"]) for row in rows] == [(150, index) for index in indices]


def test_a_step_that_is_too_large_for_the_journal_has_no_samples(root):
    arguments = ["samples", "frozen", "--step", "9" * 20, "--sessions", str(root)]

    result = CliRunner().invoke(cli, arguments)

    assert (result.exit_code, result.output[:10]) == (0, "no samples")


def test_the_folder_of_sessions_may_stand_before_the_command(root, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path / "none"))
    result = CliRunner().invoke(cli, ["--sessions", str(root), "ls"])
    assert result.exit_code == 0
    assert "frozen" in result.output


def test_what_stands_after_the_command_holds_before_that(root, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TUI_SESSIONS", "")
    arguments = ["--sessions", str(tmp_path / "none"), "ls", "--sessions", str(root)]
    assert "frozen" in CliRunner().invoke(cli, arguments).output


@pytest.mark.parametrize("words", [["--sessions", "my", "ls"], ["ls", "--sessions", "my"]])
def test_a_command_in_a_message_names_the_folder_that_was_given(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = CliRunner().invoke(cli, words).output
    there = tmp_path / "my"
    assert output == f"no sessions in {there}; start one with: rlhf-tui demo --sessions my\n"


@pytest.mark.parametrize("verb", ["plan", "check", "run", "launch"])
def test_the_starters_configuration_is_given_by_its_name(verb, tmp_path):
    arguments = [verb, "starter:demo", "-o", "train.steps=0"]
    if verb in ("run", "launch"):
        arguments += ["--sessions", str(tmp_path)]
    with pytest.raises(ConfigError, match="steps must be"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)


@pytest.mark.parametrize("answer", ["n", "y"])
def test_deleting_asks_whoever_sits_there_wherever_the_output_goes(session_maker, tmp_path, answer):
    session = session_maker(tmp_path / "s", "mine", 3)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "rlhf_tui.cli", "rm", "mine", "--sessions"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "s")], stdin=slave, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(slave)
    assert select.select([process.stderr], [], [], DEADLINE)[0], "it did not ask"
    os.write(master, f"{answer}\n".encode())
    said, asked = process.communicate(timeout=DEADLINE)
    os.close(master)
    assert process.returncode == 0
    assert b"delete session 'mine'" in asked
    assert said == b""
    assert session.folder.exists() == (answer == "n")


@pytest.mark.parametrize(("command", "words"), [("plan", b"reading the "), ("check", b"loading ")])
def test_a_command_of_many_seconds_says_on_a_terminal_what_it_does(command, words):
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_tui.cli", command, str(starter.FOLDER / "demo.yaml")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        assert select.select([master], [], [], DEADLINE)[0], "it says nothing"
        assert os.read(master, 1000).startswith(words)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        os.close(master)


def test_a_locale_without_utf_8_gets_escapes_and_no_error(session_maker, tmp_path):
    session_maker(tmp_path / "s", "mine", 80)
    command = [sys.executable, "-m", "rlhf_tui.cli", "events", "mine", "--sessions"]
    done = subprocess.run(
        [*command, str(tmp_path / "s")], env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert b"beta 0.05 \\u2192 0.08" in done.stdout


@pytest.mark.parametrize("confirmed", [False, True])
def test_without_a_terminal_only_y_deletes(session_maker, tmp_path, confirmed):
    session = session_maker(tmp_path / "s", "mine", 3)
    command = [sys.executable, "-m", "rlhf_tui.cli", "rm", "mine", "--sessions"]
    done = subprocess.run(
        [*command, str(tmp_path / "s"), *(["-y"] if confirmed else [])],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert session.folder.exists() != confirmed
    assert done.returncode == (0 if confirmed else 2)
    assert len(done.stderr.splitlines()) == (0 if confirmed else 1)
    assert ("give -y" in done.stderr) != confirmed


def test_several_sessions_are_deleted_or_none_if_one_is_missing(session_maker, tmp_path):
    root = tmp_path / "s"
    sessions = [session_maker(root, name, 3) for name in ("one", "two", "three")]
    arguments = ["rm", "-y", "--sessions", str(root)]
    missing = CliRunner().invoke(cli, [*arguments, "one", "four"])
    assert isinstance(missing.exception, NoSuchSessionError)
    assert all(session.folder.exists() for session in sessions)
    assert CliRunner().invoke(cli, [*arguments, "one", "two", "one"]).exit_code == 0
    assert [session.folder.exists() for session in sessions] == [False, False, True]


@pytest.mark.parametrize("name", MODULES)
def test_every_option_of_a_command_has_a_line_of_help(name):
    command = cli.get_command(click.Context(cli), name)
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


def test_the_help_lists_each_command_once_with_its_whole_summary():
    listed = re.findall(
        r"^  ([a-z]+) {2,}(\S.*)$", CliRunner().invoke(cli, ["--help"]).output, re.M
    )
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in MODULES}
    summaries = [(n, c.get_short_help_str(1000)) for n, c in commands.items() if not c.hidden]
    assert sorted(listed) == sorted(summaries)


def test_an_option_between_the_name_and_the_verb_is_told_where_it_stands():
    result = CliRunner().invoke(cli, ["ctl", "frozen", "--wait", "pause"])
    assert "give --wait before NAME or after the verb" in result.output


def test_a_note_among_the_verbs_is_told_where_it_stands():
    result = CliRunner().invoke(cli, ["ctl", "frozen", "note", "hello"])
    assert result.exit_code == 2
    assert "note is a command of its own: rlhf-tui note frozen TEXT" in result.output


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_help_of_a_verb_needs_no_name_and_that_of_all_verbs_may_have_one(option):
    of_verb = CliRunner().invoke(cli, ["ctl", "beta", option])
    assert of_verb.exit_code == 0
    assert "Usage: cli ctl NAME beta" in of_verb.output
    of_all = CliRunner().invoke(cli, ["ctl", "frozen", option])
    assert of_all.exit_code == 0
    assert of_all.output == CliRunner().invoke(cli, ["ctl", option]).output


@pytest.mark.parametrize("verb", ctl.commands)
def test_every_option_of_a_verb_has_a_line_of_help(verb):
    params = ctl.commands[verb].params
    assert [p.name for p in params if isinstance(p, click.Option) and not p.help] == []


def test_guard_rails_are_evaluated_with_and_without_dry_run(root):
    given = ["guardrails", "frozen", "--sessions", str(root)]
    plain, dry = (CliRunner().invoke(cli, [*given, *more]) for more in ([], ["--dry-run"]))
    assert (plain.exit_code, dry.exit_code) == (0, 0)
    assert plain.output == dry.output


@pytest.mark.parametrize("given", ["froze", "forzen", "roz"])
def test_a_name_that_is_nearly_right_gets_a_suggestion(root, given):
    with pytest.raises(NoSuchSessionError, match=r"did you mean frozen\?"):
        existing(root, given)


def test_rm_deletes_one_checkpoint_of_a_session(session_maker, tmp_path):
    session = session_maker(tmp_path, "mine", 100)
    for step in (50, 100):
        checkpoint_path(session.checkpoints, step).mkdir()
        (checkpoint_path(session.checkpoints, step) / "COMPLETE").touch()
    rm = ["rm", "mine", "--sessions", str(tmp_path), "--checkpoint"]
    asked = CliRunner().invoke(cli, [*rm, "50"], standalone_mode=False)
    assert "give -y to delete a checkpoint of 'mine'" in str(asked.exception)
    last = CliRunner().invoke(cli, [*rm, "100", "-y"], standalone_mode=False)
    assert "a resume continues from" in str(last.exception)
    assert CliRunner().invoke(cli, [*rm, "50", "-y"]).exit_code == 0
    assert list(complete_checkpoints(session.checkpoints)) == [100]
    with JournalReader(session) as reader:
        assert [c.step for c in reader.checkpoints()] == [100]


def test_a_checkpoint_that_was_moved_aside_is_listed_and_deleted(session_maker, tmp_path):
    session = session_maker(tmp_path, "mine", 100)
    aside = aside_path(session.checkpoints, 50, 2)
    aside.mkdir()
    (aside / "COMPLETE").touch()
    given = ["mine", "--sessions", str(tmp_path)]
    assert "moved aside 50-attempt-2," in CliRunner().invoke(cli, ["status", *given]).output
    rm = ["rm", *given, "-y", "--checkpoint"]
    other = CliRunner().invoke(cli, [*rm, "50-attempt-1"], standalone_mode=False)
    assert "no checkpoint 50-attempt-1 (there are: 50-attempt-2)" in str(other.exception)
    status = CliRunner().invoke(cli, ["status", *given, "--json"]).output
    assert json.loads(status)["moved_aside"] == ["50-attempt-2"]
    lock = session.acquire()  # no engine needs it
    assert CliRunner().invoke(cli, [*rm, "50-attempt-2"]).exit_code == 0
    lock.release()
    assert not aside.exists()
    assert "moved aside" not in CliRunner().invoke(cli, ["status", *given]).output


def test_a_name_that_is_like_no_other_gets_no_suggestion(root):
    with pytest.raises(NoSuchSessionError, match="rlhf-tui ls") as raised:
        existing(root, "unlike")
    assert "did you mean" not in str(raised.value)


def test_note_prints_what_was_noted_and_at_which_step(session_maker, tmp_path):
    session = session_maker(tmp_path / "s", "mine", 3)
    arguments = ["note", "mine", "looks\x1b[31m good", "--sessions", str(tmp_path / "s")]
    result = CliRunner().invoke(cli, arguments)
    assert result.output == "noted at step 3: looks␛ good\n"
    with JournalReader(session) as reader:
        assert reader.events(1)[0].step == 3


def test_a_scheduler_that_repeats_a_finished_run_does_not_train_it_on(session_maker, tmp_path):
    session = session_maker(tmp_path, "done", 3)  # no checkpoint: a resume would begin at step 0
    arguments = ["run", "run.yaml", "--name", "done", "--resume-if-exists", "--headless"]
    result = CliRunner().invoke(cli, [*arguments, "--sessions", str(tmp_path), "-o", "seed=1"])
    assert (result.exit_code, session.is_live()) == (0, False)
    assert result.output.startswith("session 'done' has finished at step 3")
    assert "rlhf-tui resume done -o train.steps=6" in result.output  # without it nothing is left


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["eval.holdout=5"], "the run held 2 back and trained on the others"),
        (["seed=7"], "seed must be that of the run (0)"),
    ],
)
def test_prompts_that_were_trained_on_are_not_evaluated_as_held_out(
    session_maker, tmp_path, overrides, problem
):
    session = session_maker(tmp_path / "s", "mine", 3)
    config = config_file.override(session.config(), ["eval.holdout=2", "eval.every=1"])
    session.write_config(config)
    given = [word for override in overrides for word in ("-o", override)]
    done = CliRunner().invoke(cli, ["eval", "mine", *given, "--sessions", str(tmp_path / "s")])
    assert problem in str(done.exception)
    assert done.exception.exit_code == 2


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(
    "words",
    [("replay", "x", "--speed"), ("ctl", "x", "pause", "--timeout"), ("join", "h:1", "--wait")],
)
def test_a_number_of_an_option_is_finite(words, number):
    result = CliRunner().invoke(cli, [*words, number])
    assert result.exit_code == 2
    assert "is not " in result.output


def test_one_of_a_thing_is_no_plural(session_maker, tmp_path):
    session_maker(tmp_path / "s", "mine", 3)
    target = tmp_path / "rows"
    arguments = ["export", "mine", "--samples", str(target), "--sessions", str(tmp_path / "s")]
    assert CliRunner().invoke(cli, arguments).output == f"wrote 24 samples to {target}\n"
    assert plural(1, "sample") == "1 sample"


def test_an_interrupt_while_the_program_is_imported_is_one_line(tmp_path):
    (tmp_path / "click.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_tui", "ls"], env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "rlhf-tui: interrupted\n")


INTERRUPTED = """
import os, signal, sys
from rlhf_tui.cli import cli, in_plain_words
exec_ = os.execve
def interrupted(*arguments):
    signal.raise_signal(signal.SIGINT)
    exec_(*arguments)
os.execve = interrupted
cli.main(sys.argv[1:], standalone_mode=False)
"""


def test_an_interrupt_of_a_run_that_becomes_the_engine_is_one_line(tmp_path):
    words = ["demo", "--headless", "--name", "mine", "--sessions", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    started, interrupted = done.stderr.splitlines()
    assert started.startswith("session mine: starting")
    assert interrupted == "rlhf-tui: interrupted"
    assert not (tmp_path / "mine").exists()  # nothing was trained: its name is free again


def test_a_resume_that_is_interrupted_as_early_keeps_the_session(session_maker, tmp_path):
    session = session_maker(tmp_path / "s", "mine", 3)
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "resume", "mine", "--headless", "--sessions",
         str(session.folder.parent), "-o", "train.steps=9"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    with JournalReader(session) as reader:
        assert reader.last_step() == 3


def test_doctor_prints_words_not_python(tmp_path):
    printed = CliRunner().invoke(cli, ["doctor", "--sessions", str(tmp_path)]).output
    assert re.search(r"^gpus +(none|\w)", printed, re.MULTILINE)
    assert not re.search(r"True|False|None|\[", printed)


def test_resume_is_a_hidden_name_of_unpause():
    resume, unpause = ctl.commands["resume"], ctl.commands["unpause"]
    assert resume.hidden
    assert resume.callback is unpause.callback
    assert [p.name for p in resume.params] == [p.name for p in unpause.params]


def test_a_user_without_an_entry_has_a_number(monkeypatch):
    def unknown():
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", unknown)
    assert identity.who().startswith(f"uid-{os.getuid()}")


def test_a_terminal_without_a_name_is_left_out(monkeypatch):
    def unknown(fd):
        raise OSError("no such device")

    monkeypatch.setattr(os, "ttyname", unknown)
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    assert " on " not in identity.who()


# -- awkward terminals, files and arguments --------------------------------------------------------


def run_in_shell(root, line):
    """Runs a line of bash in which `$R` is the program; stdout and stderr are returned."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, check=False,
        env=os.environ | {
            "R": f"{sys.executable} -m rlhf_tui.cli", "RLHF_TUI_SESSIONS": str(root),
        },
        stdin=subprocess.DEVNULL, timeout=DEADLINE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "code", "error"),
    [
        ("$R samples frozen --last 9000 | head -1 >&2", 0, b"step "),
        ("$R samples frozen --last 9000 > /dev/full", 1, b"cannot write the output: No space left"),
        ("$R ls >&- <&-", 0, b""),
        ("$R ls --sessions $(printf '%5000s' | tr ' ' x)", 2, b"the path is too long"),
        ("cd $(mktemp -d); rmdir $PWD; $R ls --sessions x", 1, b"current folder has been deleted"),
        ("cd $(mktemp -d); rmdir $PWD; $R ls --sessions $RLHF_TUI_SESSIONS", 0, b""),
        ("cd $(mktemp -d); rmdir $PWD; unset RLHF_TUI_SESSIONS; $R ls", 1, b"has been deleted"),
        ("cd $(mktemp -d); ln -s x x; $R ls --sessions x", 2, b"x is a loop of symbolic links"),
        ("cd $(mktemp -d); ln -s x x; $R metrics frozen --format csv -o x", 0, b""),
        ("$R note frozen $'bad \\xff'", 2, b"TEXT is not valid UTF-8"),
        ("$R ctl frozen probe $'bad \\xff'", 2, b"TEXT is not valid UTF-8"),
    ],
)
def test_an_error_of_the_shell_s_files_and_texts_is_one_line(root, line, code, error):
    done = run_in_shell(root, line)
    assert done.returncode == code, done.stderr
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == (1 if error else 0)
    assert len(done.stderr) < 400


def test_a_note_on_a_full_disk_is_one_line(session_maker, tmp_path):
    session_maker(tmp_path / "s", "mine", 3)
    done = run_in_shell(tmp_path / "s", "ulimit -f 0; $R note mine text")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(rb"cannot (open|write) \S*journal.db", done.stderr)


def test_a_log_that_is_a_pipe_is_not_waited_for(session_maker, tmp_path):
    session = session_maker(tmp_path / "s", "mine", 3)
    session.log_file.unlink(missing_ok=True)
    os.mkfifo(session.log_file)
    arguments = ["logs", "mine", "--sessions", str(tmp_path / "s")]
    with pytest.raises(SessionError, match="not a regular file"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)


def notify_test(root, *overrides):
    """The outcome of `notify test` on a new session."""
    config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
    create(root, "run", config)
    return CliRunner().invoke(cli, ["notify", "test", "run", "--sessions", str(root)])


def test_a_test_message_goes_to_every_channel_and_each_fate_is_printed(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_HOOK", raising=False)
    done = notify_test(
        tmp_path / "s",
        f"notify.command=cat > {tmp_path}/got",
        "notify.webhooks=[{format: slack, url_variable: NO_SUCH_HOOK}]",
        "notify.level=error",
    )
    assert done.output.splitlines() == [
        "notify.command: sent",
        "notify.webhooks[0] (slack): failed: the environment variable NO_SUCH_HOOK is not set",
    ]
    assert str(done.exception) == "1 of 2 channels failed"
    assert json.loads((tmp_path / "got").read_text())["kind"] == "test"


def test_a_test_message_without_a_channel_says_how_to_name_one(tmp_path):
    done = notify_test(tmp_path / "s")
    assert "has no notification channel: set notify.command" in str(done.exception)
    assert done.exception.exit_code == 2
