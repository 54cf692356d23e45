"""The demo learns, stays close to its reference, and still generates sentences."""

import statistics

import pytest

STEPS = 60


@pytest.fixture(scope="module", params=[0, 1, 2], ids="seed {}".format)
def learned(request, lab):
    name = f"learned-{request.param}"
    done = lab.cli(
        "demo", "--headless", "--steps", STEPS, "--name", name, "-o", f"seed={request.param}",
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return lab.json("metrics", name), lab.json("samples", name, "--last", 64)


@pytest.mark.slow
def test_the_score_rises_by_most_of_its_initial_standard_deviation(learned):
    rows, _ = learned
    scores = [r["objective/scores"] for r in rows]
    gain = statistics.mean(scores[-10:]) - statistics.mean(scores[:10])
    assert gain >= 0.8 * rows[0]["objective/scores_std"]


@pytest.mark.slow
def test_the_kl_stays_within_twice_its_target(learned):
    rows, _ = learned
    assert len(rows) == STEPS
    assert all(0 <= r["objective/kl"] <= 2 * 5.0 for r in rows[1:])


@pytest.mark.slow
def test_the_last_responses_are_still_sentences(learned):
    _, samples = learned
    sentences = [s for s in samples if s["ended"] and s["response"].rstrip()[-1:] in ".!?"]
    assert len(sentences) >= 0.9 * len(samples)
    lengths = [len(s["response"].split()) for s in samples]
    assert 4 <= statistics.mean(lengths) <= 25
    assert len({s["response"] for s in samples}) >= 0.5 * len(samples)
