"""What the pages tell a user to type and to write is what the program takes."""

import ast
import contextlib
import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import click
import pytest
import yaml

from engine import starter
from engine.config import file as config_file
from engine.config.key_errors import known_keys
from engine.errors import NoSuchSessionError, RlhfError
from engine.journal.judgements.labels import Response, prefer, set_label
from engine.journal.samples import SampleReader
from engine.session.access import FILE_MODE, FOLDER_MODE
from engine.session.folder import SessionFolder
from rlhf_tui.cli import cli
from tests.docs.pages import PAGES, ROOT, blocks, commands, shell_lines, spans, title

OLD = Path(__file__).parents[1] / "data" / "sessions-0.1.0"
OF_OURS = [page for page in PAGES if not page.name.startswith(("from-", "contributing"))]
"""Pages that name no keys of others, which tests/docs/test_pages.py looks at, or of examples."""
KEY = re.compile(r"([a-z_]+(?:\.(?!log$|py$|sock$|yaml$)[a-z_]+)+)(?:[:=].*)?")
NAMED_ONLY = (click.MissingParameter, click.BadOptionUsage, click.exceptions.NoArgsIsHelpError)
"""What a command is refused for that a text names without its arguments."""
every_page = pytest.mark.parametrize("page", PAGES, ids=title)


@pytest.fixture
def parsed(monkeypatch):
    """Parses commands as the program does; returns the values of the options, and runs nothing."""
    for variable in ("RLHF_TUI_COLORS", "RLHF_TUI_SESSIONS"):
        monkeypatch.delenv(variable, raising=False)  # an option may set it
    given = {}
    whole = click.Command.invoke

    def invoke(command, context):
        if isinstance(command, click.Group) and context.invoked_subcommand:
            whole(command, context)
        else:
            given.update(context.params)

    monkeypatch.setattr(click.Command, "invoke", invoke)

    def parse(words):
        given.clear()
        cli.main(list(words), standalone_mode=False)
        return given

    return parse


def refusal(command, parse):
    """Why the program does not take a command of a page; None if it does."""
    try:
        given = parse(command.words)
        own = ROOT / (given.get("config") or "")
        base = own if own.is_file() else starter.FOLDER / "demo.yaml"
        config_file.load(base, given.get("overrides", ()))
    except NAMED_ONLY as error:
        return str(error) if command.whole else None
    except (click.UsageError, RlhfError) as error:
        return str(error)
    return None


@every_page
def test_the_program_takes_every_command_of_a_page(page, parsed):
    refused = {c.text: refusal(c, parsed) for c in commands(page)}
    assert not {text: reason for text, reason in refused.items() if reason}


@every_page
def test_every_yaml_block_is_part_of_a_configuration(page):
    for block in blocks(page, "yaml"):
        tree = {
            "model": {}, "data": {"prompts": "starter:prompts"},
            "reward": {"model": "starter:reward"},
        } | yaml.safe_load(block)  # fmt: skip
        tree["model"].setdefault("policy", "starter:policy")
        config_file.from_tree(tree)


@pytest.mark.parametrize("page", OF_OURS, ids=title)
def test_every_key_that_a_page_names_exists(page):
    keys = known_keys()
    sections = {key.split(".")[0] for key in keys}
    named = {m[1] for span in spans(page) if (m := KEY.fullmatch(span))}
    ours = {key for key in named if key.split(".")[0] in sections}
    assert not {key for key in ours if not any(f"{k}.".startswith(f"{key}.") for k in keys)}


def parse_python(text):
    """Parses statements, entries of a dictionary, or cases of a match."""
    cases = textwrap.indent(text, "  ")
    for whole in (text, f"{{{text}}}", f"match x:\n{cases}"):
        with contextlib.suppress(SyntaxError):
            ast.parse(whole)
            return
    pytest.fail(f"not Python:\n{text}")


@every_page
def test_code_of_a_page_is_python_and_json(page):
    for block in blocks(page, "python"):
        parse_python(textwrap.dedent(block))
    for block in blocks(page, "json"):
        json.loads(block)


@every_page
def test_make_knows_the_targets_that_a_page_names(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = re.findall(r"^make ([a-z-]+)", "\n".join([*spans(page), *shell_lines(page)]), re.M)
    assert set(named) <= set(targets)


def test_every_target_of_make_uses_variables_that_are_defined():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    said = subprocess.run(
        ["make", "--dry-run", "--warn-undefined-variables", *targets],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "undefined variable" not in said.stderr


@every_page
def test_a_block_of_commands_says_that_it_is_one(page):
    for block in blocks(page, ""):
        assert not re.search(r"^ *(?:\S*rlhf-tui|make|python|pip|pipx|git) ", block, re.M), block


# -- carried out -----------------------------------------------------------------------------------

READING = {
    "ls", "status", "metrics", "samples", "events", "logs", "guardrails", "diff", "verify",
    "init", "report", "export", "completion", "note", "doctor", "reward agreement",
}  # fmt: skip
"""Commands that need no engine and no model, and take no time."""
ELSEWHERE = ("ssh:", "--follow", "-f", "--merged", "--ema", "--processes")
"""What only another machine, a live run or another session has."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with two recorded sessions, one of which was judged, and a configuration."""
    folder = tmp_path_factory.mktemp("recorded")
    shutil.copytree(OLD, folder, dirs_exist_ok=True)
    shutil.copy(starter.FOLDER / "demo.yaml", folder / "my-run.yaml")
    sessions = folder / "sessions"  # the clone may be writable by a group
    for path in (sessions, *sessions.rglob("*")):
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
        if path.name == "config.yaml":
            path.write_text(path.read_text().replace("@FOLDER@", str(folder)))
    session = SessionFolder(folder / "sessions" / "finished")
    with SampleReader(session) as reader:
        rows = sorted(reader.newest(None), key=lambda row: row.score)
    best, worst = (
        Response(response=row.response, attempt=row.attempt, step=row.step, index=row.index)
        for row in (rows[-1], rows[0])
    )
    set_label(session, rows[-1].prompt, best, "good", "me")
    set_label(session, rows[0].prompt, worst, "bad", "me")
    prefer(session, rows[-1].prompt, best, worst, "me")
    return folder


def test_commands_that_only_read_do_what_the_pages_say(recorded, monkeypatch, capsys):
    monkeypatch.chdir(recorded)
    monkeypatch.setenv("XDG_STATE_HOME", str(recorded / "state"))
    monkeypatch.delenv("RLHF_TUI_SESSIONS", raising=False)
    done = {command for page in PAGES for command in commands(page) if carried_out(command)}
    assert {verb(command) for command in done} == READING
    for command in sorted(done):
        for file in ("run.yaml", *command.words[1:]) if verb(command) == "init" else ():
            Path(file).unlink(missing_ok=True)  # it replaces none, the default one neither
        if verb(command) == "export":
            shutil.rmtree("folder", ignore_errors=True)
        try:
            cli.main(list(command.words), standalone_mode=False)
        except (*NAMED_ONLY, NoSuchSessionError):  # of a command without NAME, none is live
            assert not command.whole
        except SystemExit as end:
            assert not end.code, command.text
        assert capsys.readouterr().out or not command.whole, command.text


def verb(command):
    words = command.words[:2] if command.words[:1] == ("reward",) else command.words[:1]
    return " ".join(words)


def carried_out(command):
    return verb(command) in READING and not any(w.startswith(ELSEWHERE) for w in command.words)
