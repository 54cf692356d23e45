"""A session's folder with a journal, written as a supervisor writes it; no process, no torch."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine import starter
from engine.config import file as config_file
from engine.config.settings import SettingChange
from engine.journal.writer import JournalWriter
from engine.protocol.rank_messages import Sample, StepReport, TokenArrays
from engine.session.folder import SessionFolder, create
from tests.engine.supervised import Engine


class Writer:
    """Writes a run into a journal, in the few words that tests need."""

    def __init__(self, session: SessionFolder) -> None:
        self.session = session
        self.journal = JournalWriter(session)

    def steps(self, *steps: int, **metrics: float) -> None:
        """Steps with a score that tells the attempt, and two samples each."""
        for step in steps:
            values = {"objective/scores": step + self.journal.attempt / 10, "lr": 1e-5} | metrics
            samples = [self.sample(step, index) for index in range(2)]
            self.journal.record_step(
                StepReport(step=step, metrics=values, samples=samples, settings={"beta": 0.1})
            )

    def sample(self, step: int, index: int, **changed: object) -> Sample:
        """One answer; the first of a step has its arrays."""
        arrays = TokenArrays(
            tokens=["a", "b"], token_ids=[1, 2], logprob=[-1.0, -2.0], ref_logprob=[-1.0, -2.5],
            advantage=[0.5, -0.5], value=[],
        )  # fmt: skip
        values = {
            "index": index, "prompt": f"prompt {index}", "response": f"answer {step}.{index}",
            "score": float(step), "kl": 0.5, "length": 2, "ended": index == 0,
            "parts": {"reward": float(step)}, "arrays": arrays if index == 0 else None,
        }  # fmt: skip
        return Sample(**(values | changed))

    def change(self, command_id: str, step: int, old: float, new: float, key: str = "beta") -> None:
        """A setting changed by a command, applied at a step."""
        self.order(command_id, "set", key=key, value=new)
        self.journal.commands.apply(command_id, step, [SettingChange(key=key, old=old, new=new)])

    def undo(self, command_id: str, step: int, old: float, new: float, key: str = "beta") -> None:
        """The last change taken back."""
        self.order(command_id, "undo")
        self.journal.commands.apply(command_id, step, [SettingChange(key=key, old=old, new=new)])

    def order(self, command_id: str, command: str, **args: object) -> None:
        """A command, accepted."""
        assert self.journal.commands.record(command_id, command, args, "me")
        self.journal.commands.accept(command_id)

    def checkpoint(self, step: int) -> None:
        """A whole checkpoint, in the journal and in the folder."""
        self.journal.checkpoints.record(step, 1000, 0.5, 1.5)
        self.journal.checkpoints.complete(step)
        folder = self.session.checkpoints / f"step-{step:06d}"
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text('{"hashes": {}}')
        (folder / "COMPLETE").touch()


@pytest.fixture(autouse=True)
def no_illegal_state(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test makes of a session, its states follow each other as they may."""
    yield
    assert "illegal transition" not in "".join(r.getMessage() for r in caplog.get_records("call"))


@pytest.fixture
def make_session(tmp_path: Path) -> Callable[..., SessionFolder]:
    """A session of the demo's configuration."""

    def make(name: str = "run", *overrides: str) -> SessionFolder:
        config = config_file.load(starter.FOLDER / "demo.yaml", overrides)
        return create(tmp_path / "sessions", name, config)

    return make


@pytest.fixture
def writer(make_session: Callable[..., SessionFolder]) -> Iterator[Writer]:
    """A journal with its first attempt begun."""
    writer = Writer(make_session())
    writer.journal.begin_attempt(0, fresh=False)
    yield writer
    writer.journal.close()


@pytest.fixture
def write_in() -> Callable[[SessionFolder], Writer]:
    """A writer for another session."""
    return Writer


@pytest.fixture
async def engine(writer):
    """Created in an event loop, which its server needs."""
    return Engine(writer)
