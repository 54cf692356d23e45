"""The output of the reading commands, for running and for finished sessions."""

import copy
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest

from engine.journal.judgements import labels
from engine.journal.judgements.labels import Response
from engine.journal.reader import JournalReader
from engine.session.folder import SessionFolder

METRICS = {
    "objective/kl", "objective/kl_per_token", "objective/kl_coef", "objective/scores",
    "objective/scores_std", "objective/rlhf_reward", "objective/non_score_reward",
    "objective/entropy", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
    "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/explained_var", "val/ratio",
    "val/ratio_var", "val/num_eos_tokens", "tokens/response_len_mean", "tokens/truncated_frac",
    "text/distinct_2", "grad_norm", "lr", "episode", "time/generate", "time/score",
    "time/reference", "time/optimise", "time/checkpoint", "time/step", "perf/tokens_per_second",
    "perf/episodes_per_second", "perf/peak_memory_gb",
}  # fmt: skip
STATUS = {"name", "state", "step", "total_steps", "attempt", "beta", "pid"}


def test_the_status_of_a_finished_run(whole):
    row = whole.lab.json("status", "whole")
    assert set(row) >= STATUS
    assert (row["name"], row["state"], row["attempt"]) == ("whole", "finished", 1)
    assert (row["step"], row["total_steps"], row["pid"]) == (8, 8, None)


def test_the_status_of_a_running_run_names_its_supervisor(endless):
    row = endless.lab.json("status", endless.name)
    assert row["state"] == "paused"
    assert row["pid"] == endless.engine().pid


def test_the_supervisor_and_the_ranks_log_lines_of_one_form(steered):
    lines = steered.lab.cli("logs", steered.name).stdout.splitlines()
    form = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \S")
    assert "attempt 1 begins" in lines[0], "of the supervisor"
    assert any("load policy" in line for line in lines), "of a rank"
    assert [line for line in lines if not form.match(line)] == []


def test_metrics_are_one_object_per_step_with_the_documented_names(whole):
    rows = whole.lab.json("metrics", "whole")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(set(row) >= METRICS for row in rows)
    assert whole.lab.json("metrics", "whole", "--last", 2) == rows[-2:]


def test_samples_have_the_keys_of_the_contract(whole):
    rows = whole.lab.json("samples", "whole")
    assert len(rows) == 8 * 4
    keys = {"step", "index", "prompt", "response", "score", "kl", "length"}
    assert all(set(row) >= keys for row in rows)
    assert all(isinstance(row["score"], float) and 1 <= row["length"] <= 6 for row in rows)


def test_events_have_the_keys_of_the_contract(steered):
    rows = steered.lab.json("events", "steered")
    assert all(set(row) >= {"kind", "time", "step"} for row in rows)
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    (beta,) = [row for row in rows if row.get("id") == "to-0.2"]
    assert (beta["command"], beta["status"], beta["applied_step"]) == ("beta", "applied", 4)
    assert beta["new"] == 0.2
    assert {"attempt", "state", "ready", "checkpoint", "command"} <= {row["kind"] for row in rows}


def test_the_events_contain_the_states_of_a_run(whole):
    assert [e["state"] for e in whole.events("state")] == ["starting", "running", "finished"]


def test_ls_lists_every_session_as_status_does(whole, endless):
    rows = {row["name"]: row for row in whole.lab.json("ls")}
    assert rows["whole"] == whole.lab.json("status", "whole")
    assert rows[endless.name]["state"] == "paused"
    printed = whole.lab.cli("ls").stdout
    assert "whole" in printed
    assert "finished" in printed


def test_an_empty_sessions_folder_says_how_to_start(make_lab):
    empty = make_lab("nothing-yet/sessions")
    assert "rlhf-tui demo" in empty.cli("ls").stdout
    assert empty.json("ls") == []


def test_a_running_session_is_found_from_another_folder(endless, tmp_path):
    lab = copy.copy(endless.lab)
    lab.environment = lab.environment | {"RLHF_TUI_SESSIONS": str(tmp_path)}
    assert str(endless.session.folder) in [row["folder"] for row in lab.json("ls")]
    assert str(endless.session.folder) in lab.cli("ls").stdout
    assert lab.cli("status", endless.name).returncode == 0
    assert lab.cli("status", "whole").returncode == 3


@pytest.mark.parametrize("command", ["status", "metrics", "samples", "events", "logs"])
def test_output_for_people_is_plain_text(whole, command):
    done = whole.lab.cli(command, "whole")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_folders_within_a_session_are_their_owners_alone(whole):
    folders = [path for path in whole.session.folder.rglob("*") if path.is_dir()]
    assert {"checkpoints", "policy", "training"} <= {folder.name for folder in folders}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_a_note_on_a_finished_run_is_an_event(whole):
    assert whole.lab.cli("note", "whole", "learned to repeat itself").returncode == 0
    assert [n["text"] for n in whole.events("note")] == ["learned to repeat itself"]
    assert whole.state == "finished"


def test_diff_shows_different_configuration_and_metrics(whole, steered):
    # Only the paths of the gates differ in the configuration.
    found = whole.lab.json("diff", "whole", "steered")
    assert set(found["config"]) <= {"reward.path", "train.steps"}
    assert found["step"] == 8
    assert found["metrics"]["objective/scores"][0] == whole.numbers()[7]["objective/scores"]
    assert "reward.path" in whole.lab.cli("diff", "whole", "steered").stdout


def test_a_closed_pipe_is_no_error(whole):
    script = f"{sys.executable} -m rlhf_tui.cli samples whole --json | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        env=whole.lab.environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.fixture
def make_annotated(whole, make_lab, request):
    """Creates a copy of the finished run with labels, notes or preferences."""

    def make(annotate):
        lab = make_lab(f"annotated/{request.node.name}/sessions")
        session = SessionFolder(lab.root / "annotated")
        shutil.copytree(whole.session.folder, session.folder)
        with JournalReader(session) as reader:
            annotate(session, reader.samples.newest())
        return SimpleNamespace(lab=lab, name=session.name)

    return make


@pytest.fixture(scope="module")
def exported(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    best = whole.lab.json("status", "whole")["best_checkpoint"]
    done = whole.lab.cli("export", "whole", "--policy", folder / "policy", "--best")
    assert f"the policy of step {best} is in" in done.stdout, done.stderr
    return folder / "policy"


def test_others_can_read_an_export_as_the_umask_says(exported):
    umask = os.umask(0o077)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in exported.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert "model.safetensors" in modes


@pytest.mark.slow
def test_the_exported_policy_generates_in_plain_transformers(exported):
    script = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('The film was', return_tensors='pt').input_ids\n"
        "out = model.generate(ids, max_new_tokens=5, do_sample=False)\n"
        "print(out.shape[1] - ids.shape[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, exported], capture_output=True, text=True, check=False,
        timeout=240, cwd=exported,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) <= 5


def test_an_export_never_overwrites_anything(whole, exported):
    done = whole.lab.cli("export", "whole", "--policy", exported)
    assert done.returncode == 2
    assert str(exported) in done.stderr


def test_samples_are_exported_as_json_lines(whole, tmp_path):
    target = tmp_path / "samples.jsonl"
    assert whole.lab.cli("export", "whole", "--samples", target).returncode == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert rows == whole.lab.json("samples", "whole")


def test_samples_have_their_labels_and_notes(make_annotated):
    run = make_annotated(lambda session, rows: [
        labels.set_label(session, rows[0].prompt, Response.of(rows[0]), "hack", "ana"),
        labels.set_note(session, rows[1].prompt, Response.of(rows[1]), "odd \x1b[2J", "ana"),
    ])  # fmt: skip
    rows = run.lab.json("samples", run.name)
    assert [(r["label"], r["note"]) for r in rows[:3]] == [
        ("hack", None), (None, "odd \x1b[2J"), (None, None),
    ]  # fmt: skip
    printed = run.lab.cli("samples", run.name, "--last", len(rows)).stdout
    assert printed.splitlines()[0].endswith("  hack")
    assert "  note: odd ␛" in printed
    assert "\x1b" not in printed


def test_preferences_are_exported_as_json_lines(make_annotated, tmp_path):
    def annotate(session, rows):
        first, second = Response.of(rows[0]), Response.of(rows[4])
        labels.prefer(session, rows[0].prompt, first, second, "ana on pts/1")
        labels.prefer(session, rows[0].prompt, Response(response="reference"), first, "ben")

    run = make_annotated(annotate)
    target = tmp_path / "pairs.jsonl"
    done = run.lab.cli("export", run.name, "--preferences", target)
    assert (done.returncode, done.stdout) == (0, f"wrote 2 pairs to {target}\n")
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    first = run.lab.json("samples", run.name)[0]
    keys = {"prompt", "chosen", "rejected", "source", "who", "time", "chosen_step"}
    assert all(set(row) >= keys and row["prompt"] == first["prompt"] for row in rows)
    assert [(r["chosen"], r["who"]) for r in rows] == [
        (first["response"], "ana on pts/1"), ("reference", "ben"),
    ]  # fmt: skip
    assert [(r["chosen_step"], r["chosen_index"]) for r in rows] == [(1, 0), (None, None)]


def test_without_preferences_an_export_says_how_to_make_them_and_writes_nothing(whole, tmp_path):
    done = whole.lab.cli("export", "whole", "--preferences", tmp_path / "pairs.jsonl")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no preferences yet: on screen 3 of rlhf-tui attach whole" in line
    assert not (tmp_path / "pairs.jsonl").exists()


def test_the_doctor_reports_as_json(lab, whole):
    done = lab.cli("doctor", "--json")
    assert done.returncode in (0, 1)
    assert {"python", "packages", "cores", "gpus", "sessions", "problems"} <= set(
        json.loads(done.stdout)
    )
