"""How the rows of a rollout are divided into micro-batches."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import starter
from engine.config import file as config_file
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.ppo.forward import MicroBatchLimit, micro_batches
from engine.train.rollout.rollout import Rollout


def rollout_of(prompt_lengths, lengths):
    prompts = [Prompt(ids=[0] * n, text="", row={}) for n in prompt_lengths]
    shape = len(lengths), max(lengths)
    empty, flags = torch.zeros(shape), torch.zeros(len(lengths), dtype=torch.bool)
    batch = batch_prompts(prompts, 1, 0)
    texts = [""] * len(lengths)
    lengths = torch.tensor(lengths)
    return Rollout(batch, empty.long(), lengths, flags, flags, empty, empty, empty, texts)


def sizes(rollout, limit):
    return [len(rows) for rows in micro_batches(rollout, rollout.rows, limit)]


def test_micro_batches_have_every_row_once_and_at_most_the_given_size():
    rollout = rollout_of([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3])
    for size in (1, 3, 8, 20):
        parts = micro_batches(rollout, rollout.rows, MicroBatchLimit(size))
        assert sorted(i for part in parts for i in part.tolist()) == list(range(8))
        assert len(parts) == math.ceil(8 / size)
        assert max(len(part) for part in parts) <= size


@pytest.mark.parametrize("limit", [12, 64])
def test_micro_batches_of_equally_long_responses_group_prompts_by_length(limit):
    rollout = rollout_of([1, 9, 4, 4, 7, 2, 3, 8, 20], [limit] * 9)
    parts = micro_batches(rollout, rollout.rows, MicroBatchLimit(3))
    spans = sorted(sorted(rollout.batch.lengths[part].tolist()) for part in parts)
    assert all(a[-1] <= b[0] for a, b in itertools.pairwise(spans))


ROWS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20)), min_size=1, max_size=30)


@given(lengths=ROWS, size=st.integers(1, 6), spare=st.integers(0, 30))
def test_by_tokens_a_micro_batch_needs_no_more_memory_than_full_ones_and_has_no_fewer_rows(
    lengths, size, spare
):
    prompts, responses = zip(*lengths, strict=True)
    rollout = rollout_of(prompts, responses)
    longest = max(prompts), max(responses) + spare
    parts = micro_batches(rollout, rollout.rows, MicroBatchLimit(size, longest))
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(lengths)))
    for rows in parts:
        of_rows = rollout.host_lengths[:, rows]
        assert len(rows) * int(of_rows.sum(0).max()) <= size * sum(longest)
        assert int(of_rows[1].sum()) <= size * longest[1]  # as many logits
    assert all(len(rows) >= size for rows in parts[:-1])


def test_by_tokens_short_responses_share_a_pass():
    # 2 responses of 64 tokens after 16: 160 tokens, of which 128 have logits.
    rollout = rollout_of([16] * 12, [64, 60, 8, 8, 8, 8, 4, 4, 4, 4, 2, 1])
    assert sizes(rollout, MicroBatchLimit(2)) == [2] * 6
    assert sizes(rollout, MicroBatchLimit(2, (16, 64))) == [2, 6, 4]


def test_by_tokens_the_room_of_long_prompts_is_not_used_for_more_logits():
    # 2 responses of 64 tokens after 200: 528 tokens, of which 128 have logits.
    rollout = rollout_of([200, 1, 1, 1, 1, 1], [1, 64, 64, 64, 64, 64])
    assert sizes(rollout, MicroBatchLimit(2, (200, 64))) == [2, 2, 2]


def test_a_response_longer_than_max_new_tokens_now_allows_still_has_a_pass():
    """A recorded rollout may be older than the setting."""
    config = config_file.load(
        starter.FOLDER / "demo.yaml",
        ["ppo={micro_batch_size: 1, micro_batch_by: tokens}", "rollout.max_new_tokens=8"],
    )
    rollout = rollout_of([2, 2], [40, 40])
    assert sizes(rollout, MicroBatchLimit.of(config, rollout)) == [1, 1]
