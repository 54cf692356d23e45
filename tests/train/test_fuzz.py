"""Any prompts file, any state of a checkpoint: it is read, or one sentence says what is wrong."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config.sections.model import DataConfig
from engine.errors import CheckpointError, UserInputError
from engine.session.checkpoints import mark_complete
from engine.train.checkpoints.folder import read_state
from engine.train.data.load_prompts import load_prompts

CORPUS = Path(__file__).parents[1] / "data" / "fuzz"
fresh = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load_or_refuse(tokenizer, path):
    try:
        prompts = load_prompts(DataConfig(prompts=str(path)), tokenizer, per_step=2, seed=0)
    except UserInputError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
    else:
        assert len(prompts.for_step(1)) == 2


@pytest.mark.parametrize("path", sorted((CORPUS / "prompts").iterdir()), ids=lambda p: p.name)
def test_a_recorded_prompts_file_is_read_or_refused_in_one_line(tokenizer, tmp_path, path):
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    load_or_refuse(tokenizer, copy)


lines = st.binary(max_size=40) | st.sampled_from(
    [b'{"prompt": "x"}', b'{"prompt": ', b"prompt", b'"', b",", b"[", b"{}", b"\xff", b"\0"]
)


@pytest.mark.slow
@fresh
@given(st.sampled_from(["jsonl", "json", "csv", "parquet"]), st.lists(lines, max_size=5))
def test_any_prompts_file_is_read_or_refused_in_one_line(tokenizer, tmp_path, ending, text):
    path = tmp_path / f"p.{ending}"
    path.write_bytes(b"\n".join(text))
    load_or_refuse(tokenizer, path)


@pytest.mark.parametrize("path", sorted((CORPUS / "states").iterdir()), ids=lambda p: p.name)
def test_a_recorded_state_of_a_checkpoint_is_refused(tmp_path, path):
    (tmp_path / "state.json").write_bytes(path.read_bytes())
    mark_complete(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        read_state(tmp_path)
    assert "\n" not in str(raised.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["state", "hashes", "settings", "step"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@pytest.mark.slow
@fresh
@given(json_values)
def test_any_state_of_a_checkpoint_is_read_or_refused(tmp_path, value):
    (tmp_path / "state.json").write_text(json.dumps(value))
    mark_complete(tmp_path)
    with contextlib.suppress(CheckpointError):
        read_state(tmp_path)
