"""Metrics and samples as CSV, JSON and Parquet."""

import csv
import io
import json
import os
import weakref

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from engine.errors import RlhfError, UserInputError
from engine.metrics import METRICS
from rlhf_tui.cli import cli
from rlhf_tui.commands.reading.row_formats import printed_rows
from rlhf_tui.output_file import write_output
from rlhf_tui.table_files import columns_of, csv_text, json_parts


@pytest.fixture
def printed(root):
    """Returns a function that runs a command on the frozen session and returns its output."""

    def run(*arguments):
        result = CliRunner().invoke(cli, ["--sessions", str(root), *map(str, arguments)])
        if result.exception is not None:
            raise result.exception
        return result.output

    return run


@pytest.mark.parametrize("command", ["metrics", "samples"])
def test_every_format_holds_the_same_rows(printed, tmp_path, command):
    rows = json.loads(printed(command, "frozen", "--json"))
    columns = columns_of(rows)
    assert json.loads(printed(command, "frozen", "--format", "json")) == rows
    lines = list(csv.DictReader(io.StringIO(printed(command, "frozen", "--format", "csv"))))
    assert [line["step"] for line in lines] == [str(row["step"]) for row in rows]
    assert list(lines[0]) == list(columns)
    said = printed(command, "frozen", "-o", tmp_path / "rows.parquet")
    assert f"{len(rows):,} rows" in said
    assert pq.read_table(tmp_path / "rows.parquet").to_pydict() == columns
    assert [f.name for f in tmp_path.iterdir()] == ["rows.parquet"]


@pytest.mark.parametrize("command", ["metrics", "samples"])
def test_a_table_without_rows_has_the_columns_of_every_table(printed, tmp_path, root, command):
    full = columns_of(json.loads(printed(command, "frozen", "--json")))
    metrics = {metric.name for metric in METRICS}
    config_file = root / "frozen" / "config.yaml"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_bytes(config_file.read_bytes())
    empty = [command, "new", "--sessions", tmp_path]
    header = printed(*empty, "--format", "csv").removesuffix("\n").split(",")
    assert header == [name for name in full if "/" not in name and name not in metrics]
    assert "0 rows" in printed(*empty, "-o", tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").column_names == header
    assert json.loads(printed(*empty, "--json")) == []


def test_rows_with_other_keys_leave_fields_empty():
    rows = [{"step": 1, "parts": {"a": 0.5}}, {"step": 2, "tags": ["x", 1]}]
    assert columns_of(rows) == {
        "step": [1, 2], "parts/a": [0.5, None], "tags": [None, '["x", 1]']
    }  # fmt: skip


@pytest.mark.parametrize("text", ["=1+1", "- one\n- two", "@x", "\t=1", "-1"])
def test_a_text_in_csv_is_what_the_model_wrote(text):
    (row,) = csv.DictReader(io.StringIO(csv_text([{"response": text, "score": -1.5}])))
    assert row == {"response": text, "score": "-1.5"}


class Row(dict):
    """A dict that a weak reference can point to."""


@pytest.mark.parametrize("count", [0, 1, 1000, 2001])
def test_a_json_list_is_written_in_parts_with_the_text_that_it_has_as_a_whole(count):
    rows = [{"step": i, "note": "é"} for i in range(count)]
    assert "".join(json_parts(rows)) == json.dumps(rows) + "\n"


def test_nothing_is_printed_of_rows_that_cannot_be_read():
    def unreadable():
        raise RlhfError("labels.db is damaged")
        yield {}

    with pytest.raises(RlhfError):
        next(json_parts(unreadable()))


@pytest.mark.parametrize("output", [None, "rows.json"])
def test_rows_are_written_as_json_without_all_of_them_in_memory(tmp_path, capsys, output):
    made, most = [], 0

    def rows():
        nonlocal most
        for i in range(5000):
            row = Row(step=i)
            made.append(weakref.ref(row))
            most = max(most, sum(r() is not None for r in made)) if i % 500 == 0 else most
            yield row

    assert printed_rows(rows(), "json", output and tmp_path / output, ())
    said = capsys.readouterr().out
    assert len(json.loads((tmp_path / output).read_text() if output else said)) == 5000
    assert "5,000 rows" in said or output is None
    assert most <= 1001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "rows.xls"), r"name the file \.csv, \.json or \.parquet"),
        (("--format", "parquet"), "give -o FILE"),
        (("-o", "/nowhere/rows.csv"), "cannot write /nowhere/rows.csv: No such file"),
        (("-o", "/nowhere/rows.parquet"), "cannot write /nowhere/rows.parquet"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(printed, arguments, message):
    with pytest.raises(UserInputError, match=message):
        printed("metrics", "frozen", *arguments)


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_a_pipe_is_written_to_and_not_replaced(printed, tmp_path, form):
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        printed("metrics", "frozen", "--last", "1", "--format", form, "-o", pipe)
        assert os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_link_stays_and_what_it_leads_to_is_replaced(printed, tmp_path):
    (tmp_path / "link.csv").symlink_to("rows.csv")
    printed("metrics", "frozen", "-o", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "rows.csv").read_text().startswith("step,")


def test_a_link_with_the_name_of_the_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    (tmp_path / f".out.csv.{os.getpid()}").symlink_to(victim)
    write_output(tmp_path / "out.csv", b"a,b\n")
    assert victim.read_text(encoding="utf-8") == "precious"
    assert (tmp_path / "out.csv").read_bytes() == b"a,b\n"
