"""`rlhf-tui verify`: its lines, its JSON, its exit codes."""

import json

import pytest

from rlhf_tui import cli


@pytest.fixture
def verify(session_maker, tmp_path, monkeypatch, capsys):
    """Runs the command on a session; returns its exit code and output."""
    session = session_maker(tmp_path / "s", "checked", 3)

    def run(*words):
        monkeypatch.setattr(
            "sys.argv", ["rlhf-tui", "verify", *words, "--sessions", f"{tmp_path}/s"]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr()

    return session, run


def test_a_problem_is_a_line_with_what_to_do_and_exit_code_1(verify):
    session, run = verify
    session.folder.chmod(0o755)
    code, shown = run("checked")
    assert code == 1
    line = next(text for text in shown.out.splitlines() if "access" in text)
    assert line.startswith("problem: access: other users can enter the session's folder")
    assert line.endswith(f"chmod 700 {session.folder}")


def test_its_json_has_the_findings_and_what_was_checked(verify):
    session, run = verify
    session.folder.chmod(0o755)
    code, shown = run("checked", "--json")
    found = json.loads(shown.out)
    assert code == 1
    assert (found["name"], found["steps"]) == ("checked", 3)
    assert found["problems"] == sum(f["level"] == "problem" for f in found["findings"])
    assert set(found["findings"][0]) == {"check", "level", "text", "advice"}


def test_a_session_that_is_not_there_is_exit_code_3(verify):
    _, run = verify
    code, shown = run("nowhere")
    assert code == 3
    assert "no session 'nowhere'" in shown.err
