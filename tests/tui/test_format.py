"""Numbers as they are shown."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.journal.rows import SampleRow
from engine.session.command_line import mark_copies
from engine.session.folder import SessionFolder
from rlhf_tui.format import NUMBER_WIDTH, command, number, value_text
from rlhf_tui.screens.parts.sample_table import cells_of
from rlhf_tui.widgets.charts.axis import axis_text
from rlhf_tui.widgets.samples.common_affixes import CommonAffixes


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.0042, 2, "0.0042"), (0.0, 2, "0.00"), (7.264, 2, "7.26"), (1.12e-4, 4, "1.12e-4"),
        (-1.12e-4, 3, "-1.1e-4"), (123456.0, 3, "123,456"), (-1234.5, 3, "-1234.5"),
        (0.05, 4, "0.0500"), (3e-5, 1, "3.0e-5"), (None, 2, "–"), (math.nan, 2, "nan"),
    ],
)  # fmt: skip
def test_a_number_has_the_digits_that_its_magnitude_asks_for(value, digits, shown):
    assert number(value, digits) == shown


@given(st.floats(-1e300, 1e300), st.integers(1, 4))
def test_a_number_always_fits_its_column_and_is_near_the_value(value, digits):
    shown = number(value, digits)
    assert len(shown) <= NUMBER_WIDTH
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.5)


@pytest.mark.parametrize(
    ("kl", "shown"), [(12.34, "12.3"), (0.0012, "0.0012"), (3.56e-7, "3.56e-7")]
)
def test_the_list_of_responses_has_the_numbers_of_the_dashboard(kl, shown):
    row = SampleRow(
        step=1, index=0, attempt=1, prompt="", response="", score=1.0, kl=kl, length=3, ended=True
    )
    assert shown in [text for text, _ in cells_of(row, CommonAffixes())]


def test_exponents_are_short_wherever_a_number_is_shown():
    assert [number(1e-5), axis_text(1e-5, None), value_text(1e-5)] == ["1.00e-5", "1.0e-5", "1e-5"]


def test_zero_has_no_sign():
    assert number(-0.0) == "0.000"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (10000.0, "10000"), (1e-5, "1e-5"), (1e9, "1e9"), (None, "off"), (False, "false"),
        ([{"name": "far", "above": 5.0, "below": None}], "[{name: far, above: 5}]"),
    ],
)  # fmt: skip
def test_a_setting_is_shown_as_it_is_typed(value, shown):
    assert value_text(value) == shown


@pytest.mark.parametrize(
    ("called", "on_path", "shown"),
    [
        (".venv/bin/rlhf-tui", False, ".venv/bin/rlhf-tui attach demo"),
        ("/opt/bin/rlhf-tui", True, "rlhf-tui attach demo"),
        ("a/__main__.py", False, "rlhf-tui attach demo"),
    ],
)
def test_a_command_can_be_typed_as_it_is_shown(called, on_path, shown, tmp_path, monkeypatch):
    if on_path:
        (tmp_path / "rlhf-tui").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("sys.executable", "/opt/bin/python")
    assert command("attach", "demo") == shown


def test_another_program_names_the_command_beside_its_python(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "rlhf-tui").touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["rlhf_tui/headless.py"])
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    assert command("ls") == f"{tmp_path}/bin/rlhf-tui ls"
    monkeypatch.chdir(tmp_path)
    assert command("ls") == "bin/rlhf-tui ls"


@pytest.mark.parametrize(
    ("variable", "root", "shown"),
    [
        (None, "sessions", ""),
        (None, "my runs", " --sessions 'my runs'"),
        (None, "/data/runs", " --sessions /data/runs"),
        ("my runs", "my runs", ""),
        ("my runs", "sessions", " --sessions sessions"),
    ],
)
def test_a_command_about_a_session_finds_it_from_the_current_folder(
    variable, root, shown, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_TUI_SESSIONS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RLHF_TUI_SESSIONS", variable)
    assert command("ls", root=tmp_path / root).endswith(f"rlhf-tui ls{shown}")


def test_a_command_that_an_engine_records_can_be_typed_in_any_folder(tmp_path, monkeypatch):
    (tmp_path / "rlhf-tui").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    typed = f"{tmp_path}/rlhf-tui logs run --sessions {tmp_path}"
    assert SessionFolder(tmp_path / "run").recorded_command("logs") == typed


def test_a_command_about_a_copy_is_one_of_the_session_s_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["/opt/bin/rlhf-tui"])
    mark_copies(tmp_path)
    assert SessionFolder(tmp_path / "run").command("resume") == "rlhf-tui resume run"
