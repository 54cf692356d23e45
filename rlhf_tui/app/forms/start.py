"""The forms that ask what to start: a new run, a resume, a fork.

Imported when one of them is opened, because configurations take a while to import.
"""

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from engine.errors import RlhfError
from engine.session.checkpoints import checkpoint_path, saved_settings
from engine.session.folder import SessionFolder, find, free_name
from rlhf_tui.app.forms.overrides import (
    EarlierRun,
    FormError,
    IncompleteError,
    check_config_file,
    check_new_name,
    split_overrides,
    typed_path,
    values_of_file,
)
from rlhf_tui.dialogs.form import Field, FormDialog, Values, Verdict
from rlhf_tui.state.runs.session_row import SessionRow, read_session_row
from rlhf_tui.widgets.completing_input import KeySuggester, PathSuggester
from rlhf_tui.widgets.lines import Row

OVERRIDES = "other settings: key=value, separated by spaces (optional)"


class StartForm(Struct, frozen=True):
    """A dialog and the command that it starts."""

    dialog: FormDialog
    arguments: Callable[[Values], list[str]]
    """What is typed → the command line, without `rlhf-tui`. Call it with valid values only."""
    name: Callable[[Values], str]
    """What is typed → the session."""


def new_run_form(root: Path) -> StartForm:
    """Asks for a configuration file."""
    present: dict[str, str] = {}
    """The values of the file, which tab completes; of no file until there is one."""
    read = ""

    def check(values: Values) -> tuple[Verdict, str]:
        nonlocal read
        if values["path"] != read:
            read = values["path"]
            present.clear()
            present.update(values_of_file(read))
        try:
            pairs = split_overrides(values["overrides"])
            return "valid", check_config_file(root, values["path"], values["name"], pairs)
        except IncompleteError as error:
            return "incomplete", str(error)
        except (FormError, RlhfError) as error:
            return "wrong", str(error)

    def name(values: Values) -> str:
        return values["name"] or free_name(root, typed_path(values["path"]).stem)

    def arguments(values: Values) -> list[str]:
        path = str(typed_path(values["path"]).absolute())
        return ["run", path, "--name", name(values), *_options(values)]

    fields = [
        Field("path", "configuration file (YAML)", hint="run.yaml", suggester=PathSuggester()),
        Field("name", "name of the session (optional)", hint="that of the file"),
        Field(
            "overrides", OVERRIDES,
            hint="kl.beta=0.1 train.steps=500", suggester=KeySuggester(present),
        ),
    ]  # fmt: skip
    rows: list[Row] = [[(f"A relative path starts at {Path.cwd()}.", "dim")]]
    dialog = FormDialog("New run from a configuration file", rows, fields, check, "start")
    return StartForm(dialog, arguments, name)


def resume_form(root: Path, name: str, from_step: int | None) -> StartForm:
    """Asks for the settings of a resume, from the last checkpoint or from that of `from_step`.

    Raises:
        RlhfError: the session cannot be read.
    """
    session = find(root, name)
    row = read_session_row(session)
    step = max(row.checkpoints, default=0) if from_step is None else from_step
    base = EarlierRun.of(session.config(), _saved(session, step) or row.settings)

    def check(values: Values) -> tuple[Verdict, str]:
        try:
            new = base.resumed(split_overrides(values["overrides"]))
        except (FormError, RlhfError) as error:
            return "wrong", str(error)
        total = new.train.steps
        if step >= total and row.state != "crashed":  # a crashed one has to record its end
            more = f"its {total} steps are done; train.steps={2 * step} extends the run"
            return "incomplete", more
        return "valid", base.changed(new) or f"up to step {total}, with the same settings"

    def arguments(values: Values) -> list[str]:
        start = [] if from_step is None else ["--from", str(from_step)]
        return ["resume", name, *start, *_options(values)]

    rows: list[Row] = [[(_resumed_from(row, step), "")]]
    if row.message:
        said = row.message.startswith(row.state)  # "stopped at once, nothing was saved"
        why = row.message if said else f"{row.state}: {row.message}"
        rows.append([(f"It {why}", "warn")])
    dialog = FormDialog(
        f"Resume {name}", rows, [_overrides(base.values(fixed=False))], check, "resume"
    )
    return StartForm(dialog, arguments, lambda _values: name)


def fork_form(root: Path, name: str, step: int) -> StartForm:
    """Asks for the name and the settings of a fork from the checkpoint of `step`.

    Raises:
        RlhfError: the session cannot be read.
    """
    session = find(root, name)
    base = EarlierRun.of(session.config(), _saved(session, step))

    def check(values: Values) -> tuple[Verdict, str]:
        try:
            folder = check_new_name(root, values["name"])
            new = base.forked(split_overrides(values["overrides"]))
        except (FormError, RlhfError) as error:
            return "wrong", str(error)
        if step >= (total := new.train.steps):
            more = f"its {total} steps are done; train.steps={2 * step} trains the fork further"
            return "incomplete", more
        return "valid", base.changed(new) or folder

    def arguments(values: Values) -> list[str]:
        return ["fork", name, "--from", str(step), "--name", values["name"], *_options(values)]

    fields = [
        Field("name", "name of the new session", free_name(root, f"{name}-fork")),
        _overrides(base.values(fixed=True)),
    ]
    rows: list[Row] = [[(f"A new session that starts from step {step} of {name}.", "dim")]]
    dialog = FormDialog(f"Fork {name} from step {step}", rows, fields, check, "fork")
    return StartForm(dialog, arguments, lambda values: values["name"])


def _saved(session: SessionFolder, step: int) -> dict[str, object]:
    return saved_settings(checkpoint_path(session.checkpoints, step))


def _overrides(values: dict[str, str]) -> Field:
    hint = f"kl.beta={float(values['kl.beta']):.4g}"
    return Field("overrides", OVERRIDES, hint=hint, suggester=KeySuggester(values))


def _options(values: Values) -> list[str]:
    """The overrides as options of the command line."""
    return [part for pair in split_overrides(values["overrides"]) for part in ("-o", pair)]


def _resumed_from(row: SessionRow, step: int) -> str:
    if not step:
        return "There is no checkpoint: the run starts again from its models."
    if row.step <= step:
        return f"The run continues after step {step}."
    lost = row.step - step
    redone = "1 step is" if lost == 1 else f"{lost} steps are"
    return f"The run returns to its checkpoint of step {step}; {redone} redone."
