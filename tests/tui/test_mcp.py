"""What an assistant sees of sessions over MCP, and what it may do to them."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.api import Session
from engine.session.registry import announce
from rlhf_tui.cli import cli

if find_spec("mcp") is None:  # an extra
    pytest.skip("mcp is not installed", allow_module_level=True)

LOOKING = ["curve", "events", "list_sessions", "metrics", "samples", "status"]
STEERING = ["checkpoint", "note", "pause", "probe", "rollback", "set_beta", "set_setting", "stop"]


def client(root, *, only_root=False, steering=False):
    # At the top these would cost every process of the tests a second.
    import mcp  # noqa: PLC0415 - see above
    from mcp_types import Implementation  # noqa: PLC0415 - see above

    from rlhf_tui.commands.integration import mcp_server  # noqa: PLC0415 - see above

    server = mcp_server.make_server(root, only_root=only_root, steering=steering)
    return mcp.Client(server, client_info=Implementation(name="helper\x1b[31m", version="1"))


async def result(connection, tool, **arguments):
    """The structured result of a tool, or the text of its error."""
    called = await connection.call_tool(tool, arguments)
    return called.content[0].text if called.is_error else called.structured_content


async def test_without_leave_to_steer_no_tool_changes_anything(root):
    async with client(root) as connection:
        tools = (await connection.list_tools()).tools
    assert sorted(tool.name for tool in tools) == LOOKING
    assert all(tool.annotations.read_only_hint for tool in tools)


async def test_with_leave_tools_that_discard_steps_say_so(root):
    async with client(root, steering=True) as connection:
        tools = {tool.name: tool.annotations for tool in (await connection.list_tools()).tools}
    assert set(LOOKING + STEERING) < set(tools)
    assert {name for name, hints in tools.items() if hints.destructive_hint} == {"rollback", "stop"}


async def test_the_page_has_every_tool_and_commands_that_exist(root):
    page = (Path(__file__).parents[2] / "docs" / "mcp.md").read_text(encoding="utf-8")
    async with client(root, steering=True) as connection:
        tools = (await connection.list_tools()).tools
    assert all(f"`{tool.name}`" in page for tool in tools)
    for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL):
        (server,) = json.loads(block)["mcpServers"].values()
        words = [server["command"], *server["args"]]
        arguments = words[words.index("rlhf-tui") + 1 :]
        assert CliRunner().invoke(cli, [*arguments, "--help"]).exit_code == 0


async def test_a_run_is_found_and_read(root):
    async with client(root) as connection:
        listed = (await result(connection, "list_sessions"))["sessions"]
        status = await result(connection, "status", session="frozen")
        names = (await result(connection, "metrics", session="frozen"))["metrics"]
        events = (await result(connection, "events", session="frozen", count=5))["events"]
    (row,) = [row for row in listed if row["name"] == "frozen"]
    assert row["step"] == status["step"] == 200
    assert status["settings"]["beta"] > 0
    assert {"objective/kl", "objective/scores"} <= {entry["name"] for entry in names}
    assert len(events) == 5


async def test_an_ambiguous_name_is_for_the_user_to_decide(
    root, session_maker, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    twins = [session_maker(tmp_path / place, "twin", 3) for place in ("one", "two")]
    locks = [twin.acquire() for twin in twins]
    for twin in twins:
        announce(twin)
    async with client(root) as connection:
        said = await result(connection, "status", session="twin")
    async with client(tmp_path / "two") as connection:
        found = await result(connection, "status", session="twin")
    async with client(root, only_root=True) as connection:
        unseen = await result(connection, "status", session="twin")
        listed = await result(connection, "list_sessions")
    for lock in locks:
        lock.release()
    assert {str(tmp_path / "one"), str(tmp_path / "two")} <= set(re.split(r"[ :]", said))
    assert "ask your user to start this server" in said
    assert found["step"] == 3
    assert "no session 'twin'" in unseen
    assert "twin" not in {row["name"] for row in listed["sessions"]}


async def test_a_long_curve_is_reduced_and_ends_with_the_newest_value(root):
    whole = Session(root / "frozen").curve("objective/kl")
    async with client(root) as connection:
        curve = await result(
            connection, "curve", session="frozen", metric="objective/kl", points=20
        )
        short = await result(
            connection, "curve", session="frozen", metric="objective/kl", points=400
        )
    assert 10 < len(curve["steps"]) <= 20
    assert (curve["steps"][-1], curve["values"][-1]) == (whole.steps[-1], whole.values[-1])
    assert {min(whole.values), max(whole.values)} <= set(curve["values"])
    at = dict(zip(whole.steps, whole.values, strict=True))
    assert curve["values"] == [at[step] for step in curve["steps"]]
    assert short["values"] == whole.values.tolist()


async def test_samples_come_in_the_order_that_is_asked_for(root):
    async with client(root) as connection:
        asked = {"session": "frozen", "order": "score", "lowest_first": True, "count": 4}
        rows = (await result(connection, "samples", **asked))["samples"]
    scores = [row["score"] for row in rows]
    assert len(scores) == 4
    assert scores == sorted(scores)


async def test_samples_of_several_turns_name_the_replies(talk):
    async with client(talk.folder.parent) as connection:
        rows = (await result(connection, "samples", session=talk.name, count=3))["samples"]
    assert [row["replies"] for row in rows] == [["\nWhy?\n", " And the actors?"], ["\nWhy?\n"], []]


def test_texts_of_models_are_sanitised_and_cut_wherever_they_stand():
    from rlhf_tui.commands.integration import mcp_server  # noqa: PLC0415 - as above

    shown = mcp_server.presentable(
        {"a\x1b[2J": ["\x1b]0;t\x07x", {"b": "y" * 5000}], "n": float("nan")}
    )
    assert "\x1b" not in json.dumps(shown, ensure_ascii=False)
    assert shown["n"] is None
    assert max(map(len, shown["a␛"][1].values())) < 2100


async def test_an_error_is_one_line_that_says_what_to_do(root):
    async with client(root) as connection:
        unknown = await result(connection, "status", session="frozem")
        metric = await result(connection, "curve", session="frozen", metric="objective/kll")
    assert "did you mean frozen" in unknown
    assert "did you mean 'objective/kl'" in metric


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("set_beta", {"value": True}),
        ("set_setting", {"key": "beta", "value": True}),
        ("rollback", {"step": True}),
        ("samples", {"count": True}),
        ("curve", {"metric": "objective/kl", "points": True}),
    ],
)
async def test_true_is_no_number(root, tool, arguments):
    async with client(root, steering=True) as connection:
        refused = await result(connection, tool, session="frozen", **arguments)
    assert "not numbers" in refused


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("status", {"step\x1b[2J": 3}, "status has no argument .*; it has session"),
        ("list_sessions", {"session": "a"}, "no argument 'session'; it has none"),
        ("pause", {"context": 1}, "no argument 'context'"),
        ("samples", {"count": "few", "order": "size"}, "samples: count: .*integer.*; order: "),
        ("set_setting", {"key": "beta", "value": [1]}, "value: .* number or .* string"),
        ("curve", {}, "metric: Field required"),
    ],
)
async def test_wrong_arguments_are_refused_in_one_line(root, tool, arguments, said):
    if tool != "list_sessions":
        arguments = {"session": "frozen"} | arguments
    async with client(root, steering=True) as connection:
        called = await connection.call_tool(tool, arguments)
    assert called.is_error
    assert re.search(said, called.content[0].text)
    assert called.content[0].text.isprintable()


async def test_what_an_assistant_does_stands_under_its_name(session_maker, tmp_path):
    session = session_maker(tmp_path / "s", "mine", 3)
    async with client(tmp_path / "s", steering=True) as connection:
        noted = await result(connection, "note", session="mine", text="the score stalls")
        refused = await result(connection, "pause", session="mine")
    assert noted == {"step": 3}
    assert "has no live engine" in refused
    note = [e.payload for e in Session(session.folder).events() if e.kind == "note"][-1]
    assert note.text == "the score stalls"
    assert note.who.startswith("assistant helper␛ of ")


def test_without_its_package_the_command_says_what_to_install(tmp_path):
    (tmp_path / "mcp").mkdir()
    (tmp_path / "mcp" / "__init__.py").write_text("raise ImportError('none', name='mcp')")
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_tui.cli", "mcp"], stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("rlhf-tui: rlhf-tui mcp needs the package mcp")
    assert len(done.stderr.splitlines()) == 1
