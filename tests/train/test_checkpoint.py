"""Checkpoints: they are complete or do not exist, and a resumed run continues bit for bit."""

import json
import shutil
import threading

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine import starter
from engine.config import file as config_file
from engine.config.settings import SettingChange, change_settings
from engine.errors import CheckpointError, DamagedCheckpointError, UserInputError
from engine.memory.estimate import estimate
from engine.memory.model import Layout
from engine.metrics import SCORE
from engine.protocol.rank_messages import Begin, RepeatedChange
from engine.session.checkpoints import complete_checkpoints, mark_complete
from engine.train.boundary import update_reference
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints.saver import Saver
from engine.train.checkpoints.shards import load_training
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from engine.train.models.language_model import fingerprint
from engine.train.models.shapes import models_of
from engine.train.reward_scales import fit_scales, use_saved_scales
from engine.train.step import train_step
from tests.privileges import held_to_modes
from tests.train.architectures import write_model
from tests.train.checkpoints import DEADLINE, begin_save, save_checkpoint


@pytest.fixture
def trained(shared_run):
    """A run after its first step, which no test trains further."""
    return shared_run(steps=1)


@pytest.fixture
def to_train(make_run):
    """A run after its first step, of the test alone."""
    run, session = make_run()
    train_step(run, 1)
    run.state.step = 1
    return run, session


def resumed(session, **fields):
    config = session.config()
    begin = Begin(attempt=2, from_step=1, **fields)
    return load_run(session, config, begin, RankGroup(config.launch))


def test_a_run_whose_reference_follows_the_policy_resumes_bit_for_bit(make_run, assert_same_step):
    run, session = make_run("kl.reference_update={every: 1, mix: 0.25}")
    original = {k: p.clone() for k, p in run.reference.lm.named_parameters()}
    train_step(run, 1)
    run.state.step = 1
    update_reference(run)
    policy = dict(run.policy.lm.named_parameters())
    for name, weight in run.reference.lm.named_parameters():
        want = 0.25 * policy[name].double() + 0.75 * original[name].double()
        torch.testing.assert_close(weight.double(), want, rtol=1e-6, atol=1e-7)
    train_step(run, 2)
    run.state.step = 2
    save_checkpoint(run, session)
    begin = Begin(attempt=2, from_step=2)
    again = load_run(session, session.config(), begin, RankGroup(session.config().launch))
    assert fingerprint(again.reference) == run.state.reference
    for continued in (run, again):  # the second update, which the checkpoint does not have
        update_reference(continued)
        assert continued.state.reference_updated == 2
    assert_same_step(run, again, 3)


def test_the_weight_of_an_adapted_entropy_bonus_is_resumed(make_run, assert_same_step):
    run, session = make_run("ppo.entropy_coef=0.01", "ppo.entropy_target=100")
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    again = resumed(session)
    assert again.state.entropy_bonus.weight == pytest.approx(0.015)
    assert_same_step(run, again, 2)


def test_a_fitted_value_function_resumes_bit_for_bit(make_run, assert_same_step):
    run, session = make_run("model.value=reward_model")
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    again = resumed(session)
    fit_scales(again, session.config())
    assert again.state.value_weights == run.state.value_weights
    assert_same_step(run, again, 2)


def test_a_reference_of_another_architecture_cannot_follow_the_policy(make_run, tmp_path):
    shape = AutoConfig.from_pretrained(starter.resolve("starter:policy"))
    shape.num_hidden_layers -= 1
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "other")
    with pytest.raises(UserInputError, match=r"model\.reference is another model"):
        make_run("kl.reference_update={every: 1}", f"model.reference={tmp_path / 'other'}")


@pytest.mark.parametrize("value", ["shared", "separate", "reward_model"])
def test_the_next_step_of_a_resumed_run_is_bitwise_equal(make_run, assert_same_step, value):
    run, session = make_run(f"model.value={value}")
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    assert_same_step(run, resumed(session), 2)


def test_a_normalisation_can_be_turned_on_and_off_by_a_resume(trained, make_run):
    run, session = trained
    save_checkpoint(run, session)
    on = ("reward.normalise=reference", "reward.normalise_samples=8")
    config = config_file.override(session.config(), on)
    begin, ranks = Begin(attempt=2, from_step=1), RankGroup(config.launch)
    again = load_run(session, config, begin, ranks)
    fit_scales(again, config)
    new, _ = make_run(*on)
    scale = (again.state.reward_mean, again.state.reward_std)
    assert scale == (new.state.reward_mean, new.state.reward_std)
    assert scale != (0.0, 1.0)
    save_checkpoint(again, session)
    off = load_run(session, session.config(), begin, ranks)
    fit_scales(off, session.config())
    assert (off.state.reward_mean, off.state.reward_std) == (0.0, 1.0)


def test_another_reward_is_reported_and_its_scales_are_measured_again(make_run):
    whole, scaled = "reward.model=starter:reward", "reward.normalise=reference"
    run, session = make_run(whole, scaled, "reward.normalise_samples=8")
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    config = config_file.override(session.config(), [f"reward.model={starter.FOLDER / 'reward'}"])
    begin, ranks, notices = Begin(attempt=2, from_step=1), RankGroup(config.launch), []

    def load():
        return load_run(session, config, begin, ranks, notify=lambda *n: notices.append(n))

    again = load()
    assert [rule for rule, _ in notices] == ["reward_changed"]
    assert "from step 2 on scores come from model /" in notices[0][1]
    assert (again.state.reward_mean, again.state.reward_std) == (0.0, 1.0)
    fit_scales(again, config)
    assert again.state.reward_mean == pytest.approx(run.state.reward_mean)  # the same weights
    save_checkpoint(again, session)
    assert load().state.reward_mean == again.state.reward_mean
    assert len(notices) == 1


def test_a_key_in_the_address_of_an_earlier_reward_is_not_shown(make_run):
    run, _ = make_run()
    run.state.scored_by, notices = "service https://example.org/score?key=secret", []
    use_saved_scales(run, notices.append)
    assert "before from service https://example.org/score: they" in notices[0]


def test_live_settings_are_restored_before_a_resume_estimates_memory(trained):
    run, session = trained
    run.config = change_settings(run.config, {"max_new_tokens": 40, "beta": 0.5})
    save_checkpoint(run, session)
    again = resumed(session)
    assert again.config == run.config != session.config()
    models = models_of(run.config, run.prompts.longest, run.device)
    expected = estimate(run.config, models, Layout()).phases["generate"]["KV cache"]
    assert again.memory.phases["generate"]["KV cache"] == expected


def test_saved_settings_that_an_earlier_version_accepted_are_not_used(trained):
    run, _ = trained
    saved = run.saved_state()
    saved.settings = structs.replace(saved.settings, epochs=10**19, beta=0.5)
    told = []
    _, config = saved.restored(run.config, told.append)
    assert (config.ppo.epochs, config.kl.beta) == (run.config.ppo.epochs, 0.5)
    (text,) = told
    assert text.startswith("the checkpoint's value is not used, 2 is: epochs must be")


def test_the_memory_check_of_a_resume_includes_its_overrides(trained):
    run, session = trained
    save_checkpoint(run, session)
    change = SettingChange(key="max_new_tokens", old=10, new=50)
    repeated = RepeatedChange(step=2, command="resume", changes=[change])
    again = resumed(session, repeat=[repeated])
    assert again.config.rollout.max_new_tokens == 10, (
        "the setting changes at the boundary, not while loading"
    )
    sizes = [r.memory.phases["generate"]["KV cache"] for r in (run, again)]
    assert sizes[1] > sizes[0]


def test_plain_transformers_loads_the_policy_with_its_tokenizer(trained):
    run, session = trained
    folder = save_checkpoint(run, session) / "policy"
    lm = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert torch.equal(lm.lm_head.weight, run.policy.lm.lm_head.weight)
    ids = tokenizer("The film was", return_tensors="pt").input_ids
    assert lm.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


def test_a_folder_without_complete_is_not_a_checkpoint(trained):
    run, session = trained
    folder = save_checkpoint(run, session)
    (folder / "COMPLETE").unlink()
    assert complete_checkpoints(session.checkpoints) == {}
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint_folder.read_state(folder)


def test_a_damaged_file_is_found_and_named(trained):
    run, session = trained
    folder = save_checkpoint(run, session)
    path, *_ = (folder / "training").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"training/{path.name}"):
        checkpoint_folder.read_state(folder)


def test_a_checkpoint_of_another_user_is_not_called_damaged(trained):
    run, session = trained
    folder = save_checkpoint(run, session)
    (folder / "state.json").chmod(0)
    with held_to_modes(), pytest.raises(CheckpointError, match="cannot be read") as raised:
        checkpoint_folder.read_state(folder)
    assert not isinstance(raised.value, DamagedCheckpointError)


def test_an_edited_state_is_found_even_if_its_hashes_are_emptied(trained):
    run, session = trained
    folder = save_checkpoint(run, session)
    content = json.loads((folder / "state.json").read_text())
    for edited in (content | {"hashes": {}}, content | {"score": 2.0}):
        (folder / "state.json").write_text(json.dumps(edited))
        with pytest.raises(DamagedCheckpointError, match=r"state\.json does not match its hash"):
            checkpoint_folder.read_state(folder)
    # Versions before sums of state.json left COMPLETE empty.
    (folder / "COMPLETE").write_text("")
    assert checkpoint_folder.read_state(folder).step == 1


def test_a_failed_write_leaves_the_older_checkpoint_and_no_partial_one(trained, monkeypatch):
    run, session = trained
    save_checkpoint(run, session)
    before = sorted(p.name for p in session.checkpoints.iterdir())

    def no_room(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.tokenizer, "save_pretrained", no_room)
    run.state.step = 2
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(run, session)
    assert sorted(p.name for p in session.checkpoints.iterdir()) == before


def test_a_tokenizer_that_cannot_be_copied_is_a_notice_and_a_resume_loads_the_original(
    trained, monkeypatch
):
    run, session = trained

    def gone(*_args, **_kwargs):
        raise FileNotFoundError(2, "No such file or directory", "vocab.txt")

    monkeypatch.setattr(run.tokenizer, "save_pretrained", gone)
    told = []
    saver = Saver(session.checkpoints, notice=told.append)
    begin_save(saver, run)
    outcome = saver.wait(DEADLINE)
    mark_complete(outcome.folder)
    (text,) = told
    assert text.startswith("the tokenizer cannot be saved, checkpoints are without it: ")
    assert not (outcome.folder / "policy" / "tokenizer.json").exists()
    assert resumed(session).tokenizer.get_vocab() == run.tokenizer.get_vocab()


def test_a_checkpoint_does_not_contain_changes_made_while_it_is_written(to_train):
    run, session = to_train
    before = {k: t.clone() for k, t in run.policy.state_dict().items()}
    moments = {
        n: run.optimiser.state[p]["exp_avg"].clone() for n, p in run.policy.named_parameters()
    }
    released = threading.Event()
    write = run.policy.lm.save_pretrained

    def slowly(*args, **options):
        assert released.wait(DEADLINE)
        write(*args, **options)

    run.policy.lm.save_pretrained = slowly
    saver = Saver(session.checkpoints)
    begin_save(saver, run)
    assert saver.busy
    assert saver.poll() is None
    train_step(run, 2)
    run.state.step = 2
    released.set()
    folder = saver.wait(DEADLINE).folder
    assert saver.poll() is None  # returned once
    mark_complete(folder)
    assert folder.name == "step-000001"
    assert checkpoint_folder.read_state(folder).step == 1
    del run.policy.lm.save_pretrained
    again = resumed(session)
    assert all(torch.equal(t, before[k]) for k, t in again.policy.state_dict().items())
    for name, parameter in again.policy.named_parameters():
        assert torch.equal(again.optimiser.state[parameter]["exp_avg"], moments[name]), name


def test_a_save_starts_after_the_previous_one_has_finished(trained):
    run, session = trained
    done = []
    saver = Saver(session.checkpoints, conclude=lambda step, _outcome: done.append(step))
    begin_save(saver, run)
    run.state.step = 2
    begin_save(saver, run)
    assert done[:1] == [1]
    saver.wait(DEADLINE)
    assert done == [1, 2]


def test_wait_raises_what_the_conclude_callback_raised(trained):
    run, session = trained

    def conclude(_step, _outcome):
        raise RuntimeError("the link broke")

    saver = Saver(session.checkpoints, conclude=conclude)
    begin_save(saver, run)
    with pytest.raises(RuntimeError, match="the link broke"):
        saver.wait(DEADLINE)


def test_the_same_state_gives_the_same_files(trained):
    run, session = trained
    first = json.loads((save_checkpoint(run, session) / "state.json").read_text())["hashes"]
    again = resumed(session)
    assert (
        json.loads((save_checkpoint(again, session) / "state.json").read_text())["hashes"] == first
    )


def test_a_checkpoint_of_format_1_can_be_resumed(to_train):
    run, session = to_train
    folder = save_checkpoint(run, session)
    training = folder / "training"
    tensors = {k: t for f in training.iterdir() for k, t in load_file(f).items()}
    shutil.rmtree(training)
    training.mkdir()
    for name, wanted in (("value", True), ("optimiser", False)):
        part = {k: t for k, t in tensors.items() if k.startswith("value_") is wanted}
        save_file(part, training / f"{name}.safetensors")
    state = json.loads((folder / "state.json").read_text())
    files = [f for f in folder.rglob("*.*") if f.name != "state.json"]
    state["format"] = 1
    state["hashes"] = {
        str(f.relative_to(folder)): checkpoint_folder.sync_and_hash(f) for f in files
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "COMPLETE").write_text("")
    again = resumed(session)
    ours, _ = train_step(run, 2)
    theirs, _ = train_step(again, 2)
    assert theirs["objective/scores"] == ours["objective/scores"]
    for one, two in zip(run.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_of_a_newer_format_is_refused(trained):
    run, session = trained
    folder = save_checkpoint(run, session)
    text = (folder / "state.json").read_text().replace('"format": 2', '"format": 3')
    (folder / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="newer rlhf-tui"):
        checkpoint_folder.read_state(folder)


def test_the_state_of_another_optimiser_or_model_is_refused(trained, make_run):
    run, session = trained
    folder = save_checkpoint(run, session)
    fused, run.optimiser.defaults["fused"] = run.optimiser.defaults["fused"], False
    with pytest.raises(CheckpointError, match="fork instead of resuming"):
        load_training(folder, run.policy, run.optimiser)
    run.optimiser.defaults["fused"] = fused
    other, _ = make_run("model.value=separate")
    with pytest.raises(CheckpointError, match="value function of another architecture"):
        load_training(folder, other.policy, other.optimiser)


def test_too_little_disk_space_is_an_error_before_anything_is_written(trained, monkeypatch):
    run, session = trained
    usage = shutil.disk_usage(session.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"it needs .* and 1 MB are free"):
        save_checkpoint(run, session)
    assert list(session.checkpoints.iterdir()) == []


def test_a_checkpoint_replaces_one_of_the_same_step(trained):
    run, session = trained
    save_checkpoint(run, session, score=1.0)
    folder = save_checkpoint(run, session, score=2.0)
    assert checkpoint_folder.read_best(folder, SCORE, run.state.scored_by) == 2.0
    assert [p.name for p in session.checkpoints.iterdir()] == ["step-000001"]


def test_a_changed_reference_is_refused_on_a_resume(trained):
    run, session = trained
    run.state.reference = "another"
    save_checkpoint(run, session)
    with pytest.raises(CheckpointError, match="not the one this run began with"):
        resumed(session)


def forked(session, *overrides):
    """The run of a fork at step 1 with other keys, and the notices of its load."""
    config, notices = config_file.override(session.config(), overrides), []
    begin, ranks = Begin(attempt=2, from_step=1), RankGroup(config.launch)
    run = load_run(session, config, begin, ranks, notify=lambda *n: notices.append(n))
    return run, notices


def test_a_fork_with_a_value_function_of_another_shape_is_told_what_to_keep(make_run, tmp_path):
    policy = write_model(tmp_path / "policy", "llama")
    run, session = make_run(f"model.policy={policy}", "model.value=separate")
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    with pytest.raises(CheckpointError, match=r"another architecture \(.*keep ppo\.value_init"):
        forked(session, "ppo.value_init=reward_model")


@pytest.mark.parametrize("keys", [[], ["lora.rank=2"]], ids=["all weights", "adapters"])
def test_a_fork_may_hold_frozen_models_in_another_dtype(make_run, keys):
    run, session = make_run(*keys)
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    fork, notices = forked(session, "model.dtype=bfloat16")
    assert not notices
    assert fork.state.reference != run.state.reference
    train_step(fork, 2)


def test_a_fork_may_have_another_reference_although_the_first_one_followed(make_run):
    run, session = make_run("kl.reference_update.every=1")
    train_step(run, 1)
    run.state.step = 1
    update_reference(run)
    save_checkpoint(run, session)
    other = ("model.reference=starter:policy", "kl.reference_update.every=0")
    fork, notices = forked(session, *other)
    assert [rule for rule, _ in notices] == ["reference"]
    assert "from step 2 on the KL is measured against starter:policy, before" in notices[0][1]
    assert fork.reference.lm.config.num_hidden_layers > run.reference.lm.config.num_hidden_layers
    train_step(fork, 2)
    fork.state.step = 1
    save_checkpoint(fork, session)
    assert not forked(session, *other)[1]
