"""Training of the architectures of transformers, as tiny models with random weights.

Of each the start of a run must hold: the ratio is 1, the KL is 0, and the log-probabilities while
generating are those of a full forward pass.
"""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CpmAntConfig, CpmAntForCausalLM

from engine import starter
from engine.config import file as config_file
from engine.errors import RlhfError, UserInputError
from engine.session.folder import create
from engine.train.checkpoints.policy_folder import policy_files
from engine.train.experience.generation import generate_rollout
from engine.train.models.pretrained import DROPOUT_BEFORE
from engine.train.ppo import chunked_loss
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.step import train_step
from tests.train.architectures import ARCHITECTURES, write_model
from tests.train.conftest import SMALL
from tests.train.ranks.launch import run_ranks

SCRIPT = Path(__file__).parent / "ranks" / "steps.py"
EVERY_TIME = ("gpt2", "mistral", "qwen3_moe", "qwen3_5_text")
"""Learnt positions and Conv1D; a window; experts; linear attention. `make test-all` has all."""
ON_TWO_RANKS = ("gpt2", "bloom", "gemma2", "qwen3_moe", "qwen3_5_text")
architectures = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in EVERY_TIME else pytest.mark.slow)
             for k in ARCHITECTURES],
)  # fmt: skip


def overrides(folder):
    return (f"model.policy={folder}", "reward.model=starter:reward", "ppo.epochs=1",
            "ppo.minibatches=1", "train.learning_rate=1e-3")  # fmt: skip


@architectures
@pytest.mark.filterwarnings("error:The following .*_pattern keys")  # a session's log has warnings
@pytest.mark.parametrize("adapters", [(), ("lora.rank=2",)], ids=["full", "lora"])
def test_a_run_starts_at_ratio_1_and_kl_0_and_samples_what_it_trains_on(
    make_run, tmp_path, kind, adapters
):
    run, _ = make_run(*overrides(write_model(tmp_path / kind, kind)), *adapters)
    metrics, _ = train_step(run, 1)  # compares the cached pass with a full one
    assert run.rollout_checked
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["val/ratio_var"] == pytest.approx(0, abs=1e-6)
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert metrics["grad_norm"] > 0
    run.state.step = 1
    metrics, _ = train_step(run, 2)
    assert abs(metrics["objective/kl"]) > 1e-6, "the update changed nothing"


@architectures
def test_in_bfloat16_the_kl_to_the_reference_is_0_before_the_first_update(make_run, tmp_path, kind):
    folder = write_model(tmp_path / kind, kind, torch.bfloat16)
    run, _ = make_run(*overrides(folder), "model.dtype=bfloat16")
    # Also the norms': a resume with FSDP, which keeps them so, compares the weights' bits.
    assert {p.dtype for p in run.reference.parameters()} == {torch.bfloat16}
    _, responses = train_step(run, 1)
    assert all(r.kl == 0 for r in responses)


def test_a_model_whose_log_probabilities_are_not_numbers_is_refused(make_run, tmp_path):
    run, _ = make_run(*overrides(write_model(tmp_path / "gpt2", "gpt2")))
    with torch.no_grad():
        run.policy.lm.lm_head.weight[5] = math.nan
    with pytest.raises(RlhfError, match="log-probabilities are not finite"):
        train_step(run, 1)


def test_a_model_that_cannot_generate_with_a_cache_is_refused(make_run, tmp_path):
    shape = CpmAntConfig(
        vocab_size=4096, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=32,
        num_hidden_layers=1, prompt_length=4,
    )  # fmt: skip
    CpmAntForCausalLM(shape).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(starter.resolve("starter:policy")).save_pretrained(tmp_path)
    with pytest.raises(UserInputError, match=r"model\.policy: CpmAnt.* choose another model"):
        make_run(f"model.policy={tmp_path}")


def test_a_router_that_is_noisy_in_training_mode_is_refused_where_that_is_used(make_run, tmp_path):
    file = write_model(tmp_path / "mixtral", "mixtral") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"router_jitter_noise": 0.3}))
    run, _ = make_run(*overrides(file.parent), "parallel.activation_checkpointing=true")
    with pytest.raises(RlhfError, match=r"here with parallel\.activation_checkpointing"):
        train_step(run, 1)


def test_ended_responses_leave_a_batch_of_a_model_with_recurrent_states(make_run, tmp_path):
    folder = write_model(tmp_path / "hybrid", "qwen3_5_text")
    stops = ("rollout.stop=[' the', 'e', 'a']", "rollout.per_prompt=2")
    run, _ = make_run(*overrides(folder), *stops)
    rollout = generate_rollout(run, 1)
    assert len(set(rollout.lengths.tolist())) > 1
    scored, _ = score_tokens(run.policy, rollout, 1.0, MicroBatchLimit(4), want="logits")
    assert (scored - rollout.logprobs)[rollout.mask].abs().max() < 1e-4


# Layers of the one have dropout as plain numbers; those of the other read the configuration.
@pytest.mark.parametrize(("kind", "key"), [("opt", "dropout"), ("falcon", "hidden_dropout")])
def test_no_dropout_is_left_where_activations_are_recomputed_in_training_mode(
    make_run, tmp_path, kind, key
):
    file = write_model(tmp_path / kind, kind) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 0.3}))
    run, _ = make_run(*overrides(file.parent), "parallel.activation_checkpointing=true")
    metrics, _ = train_step(run, 1)
    assert metrics["val/ratio_var"] == pytest.approx(0, abs=1e-6)
    saved = policy_files(run.policy, run.tokenizer)["config.json"]
    assert json.loads(saved)[key] == 0.3
    assert DROPOUT_BEFORE not in json.loads(saved)


@pytest.mark.slow
def test_two_ranks_compute_the_step_of_one(make_run, tmp_path):
    jobs, expected = [], {}
    for kind in ON_TWO_RANKS:
        keys = (*overrides(write_model(tmp_path / kind, kind)), "log.tensorboard=false",
                "launch.device=cpu", "ppo.micro_batch_size=2")  # fmt: skip
        if kind == "qwen3_moe":  # its loss of routers depends on which rows are in a pass
            keys += ("ppo.router_coef=1", "ppo.micro_batch_size=1")
        run, _ = make_run(*keys)
        rollout = generate_rollout(run, 1)
        (tmp_path / f"{kind}.pickle").write_bytes(pickle.dumps(rollout))
        expected[kind], _ = train_step(run, 1, rollout)
        for strategy in ("ddp", "fsdp"):
            config = config_file.load(
                starter.FOLDER / "demo.yaml", [*SMALL, *keys, f"parallel.strategy={strategy}"]
            )
            session = create(tmp_path, f"{kind}-{strategy}", config)
            jobs.append(
                {
                    "session": str(session.folder),
                    "recorded": str(tmp_path / f"{kind}.pickle"),
                    "result": str(tmp_path / f"{kind}-{strategy}.json"),
                    "most_logits": chunked_loss.MAX_LOGITS,
                }
            )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = run_ranks(2, SCRIPT, tmp_path / "jobs.json", folder=tmp_path)
    assert done.code == 0, done.output
    for job in jobs:
        kind = Path(job["recorded"]).stem
        metrics = json.loads(Path(job["result"]).read_text())["metrics"]
        for name, value in expected[kind].items():
            if not name.startswith(("time/", "perf/")):
                assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (kind, name)
