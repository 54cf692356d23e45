"""Configurations: files, overrides, defaults, what a resume or a fork may change, live settings."""

from pathlib import Path

import msgspec
import pytest
import yaml

from engine.config import file as config_file
from engine.config.key_errors import known_keys
from engine.config.names_elsewhere import KEYS_HERE
from engine.config.sections.reward import SOURCE_KEYS, RewardConfig
from engine.config.settings import (
    LIVE_SETTINGS,
    ONCE_FIXED,
    Settings,
    apply_settings,
    change_settings,
    settings_of,
)
from engine.errors import ConfigError
from tests.engine.demo_config import demo


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E5", 1e5), ("3", 3.0), (".5", 0.5), ("1.5e-3", 1.5e-3), ("2.e1", 20.0)],
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert demo(f"train.max_hours={text}").train.max_hours == value


def test_what_was_left_out_is_filled_in_and_stated():
    config = demo()
    stated = yaml.safe_load(config_file.dump(config))
    assert stated["train"]["keep_last"] == config.train.keep_last
    assert stated["ppo"]["whiten"] is True
    assert known_keys() == [key for key in known_keys() if key in config_file.flatten(stated)]


def test_a_written_configuration_reads_as_itself(tmp_path):
    config = demo("ppo.advantage=rloo", "rollout.stop=['\\n', 'é']", "seed=7")
    path = tmp_path / "config.yaml"
    path.write_text(config_file.dump(config), encoding="utf-8")
    assert config_file.load(path) == config


def test_defaults_depend_on_the_advantage():
    rloo = demo("ppo.advantage=rloo")
    assert (rloo.rollout.per_prompt, rloo.ppo.whiten) == (4, False)
    assert rloo.prompts_per_step * rloo.responses_per_prompt == rloo.rollout.batch_size
    assert (demo().rollout.per_prompt, demo().ppo.whiten) == (1, True)


def test_a_value_head_beside_adapters_learns_at_their_rate_and_elsewhere_at_ten_times_it():
    assert demo().ppo.value_head_rate == 10
    assert demo("lora.rank=4").ppo.value_head_rate == 1
    assert demo("lora.rank=4", "ppo.value_head_rate=3").ppo.value_head_rate == 3
    critic = ("model.value=separate", "ppo.value_init=reward_model")
    assert demo(*critic).ppo.value_head_rate == 1
    assert demo(*critic, "ppo.value_rate=9").ppo.value_head_rate == 9


def test_advantages_reach_less_far_with_a_fitted_value_function_and_its_returns_as_far():
    fitted = "model.value=reward_model"
    for overrides, lambdas in (
        ((), (0.95, None)),
        ((fitted,), (0.9, 0.95)),
        ((fitted, "ppo.lam=0.97"), (0.97, None)),
        ((fitted, "ppo.lam_value=1"), (0.9, 1)),
        ((fitted, "ppo.advantage=rloo"), (0.95, None)),
    ):
        ppo = demo(*overrides).ppo
        assert (ppo.lam, ppo.lam_value) == lambdas


def test_a_fork_keeps_the_defaults_of_its_parent_and_names_those_that_differ():
    fitted, parent = "model.value=reward_model", demo()
    for config, overrides, kept in (
        (parent, [fitted], {"ppo.lam": (0.95, 0.9), "ppo.lam_value": (None, 0.95)}),
        (
            demo(fitted),
            ["model.value=shared"],
            {"ppo.lam": (0.9, 0.95), "ppo.lam_value": (0.95, None)},
        ),
        (parent, [fitted, "ppo={lam: 0.95, lam_value: null}"], {}),
        (demo("ppo.lam=0.97"), [fitted], {}),
        (parent, ["kl.beta=0.2"], {}),
    ):
        assert config_file.kept_defaults(config, overrides) == kept
    tokens = parent.eval.max_new_tokens
    longer = config_file.kept_defaults(parent, ["rollout.max_new_tokens=99"])
    assert longer == {"eval.max_new_tokens": (tokens, 99)}


def test_all_unknown_keys_are_told_at_once():
    def problem(keys):
        with pytest.raises(ConfigError) as caught:
            demo(*(f"{key}=1" for key in keys))
        return str(caught.value)

    assert problem(["ppo.epocs"]) == "unknown key 'ppo.epocs'; did you mean 'ppo.epochs'?"
    told = problem(["ppo.epocs", "train.stepz", "lr"])
    assert all(f"'{key}'" in told for key in ("ppo.epocs", "train.stepz", "lr"))
    assert told.count("did you mean") == 1
    many = problem([f"k{i}" for i in range(7)])
    assert many.endswith(" (also unknown: 'k1', 'k2', 'k3', 'k4' and others)")


def test_mistakes_of_several_kinds_are_told_at_once():
    def problem(*overrides):
        with pytest.raises(ConfigError) as caught:
            demo(*overrides)
        return str(caught.value)

    assert problem("train.stepz=2", "lr=3", "model.dtype=float16", "kl.beta=high") == (
        "unknown key 'train.stepz'; did you mean 'train.steps'? (also unknown: 'lr'; model.dtype "
        "must be one of bfloat16, float32, not 'float16'; kl.beta must be a number, not 'high')"
    )
    assert problem("train.steps=2.5", "guardrails.rules=[{name: 3}]") == (
        "train.steps must be a whole number, not 2.5 (also: guardrails.rules[0].name must be text, "
        "not 3; the key 'guardrails.rules[0].metric' is required, but missing)"
    )
    assert problem("model=3", "reward.model=[]", "rollout=3").count(" must be ") == 3
    many = problem(*(f"train.{key}=x" for key in ("steps", "seed", "save_every", "max_hours")),
                   "kl.beta=x", "kl.target=x", "kl.horizon=x")  # fmt: skip
    assert many.endswith("; and others)")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kl.beta: 1", "unknown key 'kl.beta'; in a file, write 'beta' in the section 'kl'"),
        ("a.b.c: 1", "unknown key 'a.b.c'"),
        ("kl: {a.b: 1}", "unknown key 'kl.a.b'; did you mean 'kl.beta'?"),
        ("'': 1", "unknown key ''"),
        ("'.': 1", "unknown key '.'"),
        (
            "train: {stop_at: {metric: x, abov: 1}}\nkl: {beta: x}",
            "unknown key 'train.stop_at.abov'; did you mean 'train.stop_at'? (also: kl.beta must "
            "be a number, not 'x')",
        ),
        (
            "reward: {mix: [{modle: x}]}\nkl: {beta: x}",
            "unknown key 'reward.mix[0].modle'; did you mean 'reward.mix[0].model'? (also: kl.beta "
            "must be a number, not 'x')",
        ),
    ],
)
def test_an_unknown_key_is_told_once_wherever_it_is(tmp_path, text, problem):
    sections = "model: {policy: p}\ndata: {prompts: p}\nreward: {model: m}\n"
    if text.startswith("reward"):
        sections = sections.rpartition("reward")[0]
    (file := tmp_path / "run.yaml").write_text(sections + text)
    with pytest.raises(ConfigError) as caught:
        config_file.load(file)
    assert str(caught.value) == problem


def test_a_key_that_looks_like_the_end_of_a_message_is_refused():
    tree = {"model": {"policy": "p"}, "data": {"prompts": "p"}, "a - at `$.b": 1}
    with pytest.raises(ConfigError):
        config_file.from_tree(tree)


def test_the_keys_that_other_libraries_names_stand_for_exist():
    assert set(KEYS_HERE.values()) <= set(known_keys())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("ppo.epocs=2", "unknown key 'ppo.epocs'; did you mean 'ppo.epochs'?"),
        ("trian.steps=2", "unknown key 'trian'; did you mean 'train'?"),
        ("epochs=2", "unknown key 'epochs'; did you mean 'ppo.epochs'?"),
        ("temperature=2", "unknown key 'temperature'; did you mean 'rollout.temperature'?"),
        ("prompts=a.jsonl", "unknown key 'prompts'; did you mean 'data.prompts'?"),
        ("prompt=hi", "unknown key 'prompt'; did you mean 'data.prompts'?"),
        ("rank=8", "unknown key 'rank'; did you mean 'lora.rank'?"),
        ("kl_coef=0.1", "unknown key 'kl_coef'; did you mean 'kl.beta'? (docs/from-*.md"),
        ("algo.kl.init_coef=0.1", "unknown key 'algo' (docs/from-*.md"),
        ("ppo.epochs=0", "ppo.epochs must be a whole number of at least 1, not 0"),
        (
            "ppo.epochs=18446744073709551615",
            "ppo.epochs must be a whole number of at most 1000, not 18446744073709551615",
        ),
        (
            "train.learning_rate=5e-324",
            "train.learning_rate must be a number of at least 1e-12, not 5e-324",
        ),
        ("kl.beta=1" + "0" * 400, "kl.beta must be a finite number, not 1000"),
        ("ppo.epochs=1.5", "ppo.epochs must be a whole number, not 1.5"),
        ("ppo.epochs=", "ppo.epochs is empty; it must be a whole number"),
        ("seed=true", "seed must be a whole number, not true"),
        ("kl.controller=off", "kl.controller must be"),
        ("kl.beta_min=20", "kl.beta_min (20.0) must be below kl.beta_max (10.0)"),
        ("kl.horizon=10", "kl.horizon (10) is too small for rollout.batch_size (64)"),
        ("rollout.batch_size=63", "must be a multiple of ppo.minibatches (2)"),
        ("rollout.per_prompt=3", "must be a multiple of rollout.per_prompt (3)"),
        (
            "reward.function=a:b",
            f"exactly one of {', '.join(f'reward.{key}' for key in SOURCE_KEYS)} and ",
        ),
        ("reward.model=null", "(given: none)"),
        ("train.learning_rate=.inf", "train.learning_rate must be a finite number, not inf"),
        ("train.learning_rate=.nan", "train.learning_rate must be"),
        ("kl=5", "kl must be a section of keys"),
        ("kl.beta.deep=1", "unknown key 'kl.beta.deep'"),
        ("guardrails.rules=[{name: a, metric: b, bove: 1}]", "rules[0].bove"),
        ("guardrails.rules=[{name: a, metric: b, above: 1, of: c}]", ".of must be one of"),
        (
            "guardrails.rules=[{name: a, metric: entropy, below: 1}]",
            "no metric 'entropy' (did you mean 'objective/entropy'?)",
        ),
        (
            "guardrails.rules=[{name: a, metric: lr, above: 1}, {name: a, metric: lr, below: 0}]",
            "guardrails.rules 'a' is there twice",
        ),
        ("reward.mix=[{model: a}, {}]", "exactly one of"),
        ("data.min_prompt_tokens=600", "must not exceed data.max_prompt_tokens (512)"),
        ("data.prompts=[]", "data.prompts is an empty list"),
        (
            "data.prompts=[{path: a, weight: 1e-6}, {path: b}]",
            "data.prompts[0].weight (1e-06) must",
        ),
        (
            "data.prompts=[{paht: a}]",
            "unknown key 'data.prompts[0].paht'; did you mean 'data.prompts[0].path'?",
        ),
        ("notify.webhooks=[{format: fax}]", "notify.webhooks[0].format must be one of discord, "),
        ("train.stop_at={metric:eval/score}", "with a space after the colon"),
        ("data.prompts=[a, b]", "data.prompts[0] must be"),
        ("data.prompts=2020-13-45", "-o data.prompts: month must be in 1..12"),
        pytest.param("kl.beta=" + "[" * 5000, "-o kl.beta: ", id="deep"),
        pytest.param("seed=" + "9" * 5000, "-o seed: ", id="long"),
    ],
)
def test_a_wrong_line_is_an_error_of_one_sentence(override, says):
    with pytest.raises(ConfigError) as caught:
        demo(override)
    assert says in str(caught.value)


def test_relative_paths_start_at_the_files_folder_and_overrides_at_the_callers(
    tmp_path, monkeypatch
):
    (tmp_path / "there").mkdir()
    config = tmp_path / "there" / "run.yaml"
    config.write_text("{model: {policy: ./m}, data: {prompts: p.jsonl}, reward: {model: hub/id}}")
    monkeypatch.chdir(tmp_path)
    loaded = config_file.load(config)
    assert loaded.data.prompts == str(tmp_path / "there" / "p.jsonl")
    assert loaded.model.policy == str(tmp_path / "there" / "m")
    assert loaded.reward.model == "hub/id"
    several = config_file.override(loaded, ["data.prompts=[{path: q.csv}, {path: hub/id}]"])
    assert [s.path for s in several.data.sources] == [str(tmp_path / "q.csv"), "hub/id"]
    assert config_file.override(loaded, ["data.cache=c"]).data.cache == str(tmp_path / "c")
    changed = config_file.override(loaded, ["data.prompts=q.csv"])
    assert changed.data.prompts == str(tmp_path / "q.csv")
    assert Path(changed.model.policy).parent.name == "there"


def test_only_overrides_are_paths_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here" / "gpt2").mkdir(parents=True)
    config = tmp_path / "run.yaml"
    config.write_text("{model: {policy: gpt2}, data: {prompts: p.jsonl}, reward: {model: gpt2}}")
    loaded = config_file.load(config)
    monkeypatch.chdir(tmp_path / "here")
    assert config_file.override(loaded, ["train.steps=9"]).model.policy == "gpt2"
    changed = config_file.override(loaded, ["reward={model: gpt2}"])
    assert (changed.model.policy, changed.reward.model) == ("gpt2", str(tmp_path / "here" / "gpt2"))
    judged = config_file.override(loaded, ["eval.rewards=[{name: j, function: 'm:f'}]"])
    assert judged.reward.path == str(tmp_path / "here")
    played = config_file.override(loaded, ["environment.factory=m:Game"])
    assert played.environment.path == str(tmp_path / "here")
    moved = config_file.override(played, ["environment.path=/games"])
    kept = config_file.override(moved, ["environment.factory=m:Other"])
    assert kept.environment.path == "/games"
    again = config_file.override(judged, ["reward.batch_size=2", "kl.beta=1", "kl={}"])
    assert again.reward == msgspec.structs.replace(judged.reward, batch_size=2)


def test_keys_of_a_section_that_was_left_out_can_be_given_later(tmp_path):
    given = ["train.stop_at.metric=objective/kl", "train.stop_at.above=3"]
    aim = demo(*given).train.stop_at
    assert (aim.metric, aim.above) == ("objective/kl", 3)
    assert config_file.override(demo(), given).train.stop_at == aim
    empty = tmp_path / "run.yaml"
    empty.write_text("{model: {policy: ./m}, data: {prompts: p.jsonl}, reward: {model: r}, kl: }")
    assert config_file.load(empty, ["kl.beta=0.5"]).kl.beta == 0.5


def test_a_home_nobody_has_is_left_to_be_refused_as_a_folder():
    assert demo("model.policy=~nobody-at-all/x").model.policy == "~nobody-at-all/x"


@pytest.mark.parametrize(
    "key", ["seed=1", "data.shuffle=false", "model.policy=other", "rollout.batch_size=32"]
)
def test_a_resume_may_not_change_the_model_or_the_order_of_the_data(key):
    with pytest.raises(ConfigError, match="fork"):
        config_file.check_resumable(demo(), demo(key))


@pytest.mark.parametrize("key", ["rank=4", "alpha=9", "targets=[q_proj]"])
def test_neither_a_resume_nor_a_fork_may_change_the_adapters(key):
    before, after = demo("lora.rank=8"), demo("lora.rank=8", f"lora.{key}")
    with pytest.raises(ConfigError, match=r"lora\.\w+ cannot change on a resume") as caught:
        config_file.check_resumable(before, after)
    assert "fork" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"lora\.\w+ cannot change on a fork.*--merged"):
        config_file.check_forkable(before, after)


def test_a_fork_that_adds_adapters_is_refused_by_the_key_that_was_given():
    with pytest.raises(ConfigError, match=r"lora\.rank cannot.*export the policy and start"):
        config_file.check_forkable(demo(), demo("lora.rank=8"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.value=shared", "model.value=separate"),
        ("model.value=shared", "model.value=reward_model"),
        ("model.value=reward_model", "model.value=shared"),
        ("ppo.advantage=gae", "ppo.advantage=rloo"),
    ],
)
def test_neither_a_resume_nor_a_fork_may_change_the_value_function_that_is_trained(before, after):
    with pytest.raises(ConfigError, match="cannot change on a resume") as caught:
        config_file.check_resumable(demo(before), demo(after))
    assert "fork" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot change on a fork.*export the policy and start"):
        config_file.check_forkable(demo(before), demo(after))


def test_a_fork_may_change_everything_but_what_the_checkpoint_depends_on():
    rloo, grpo = demo("ppo.advantage=rloo"), demo("ppo.advantage=grpo")
    config_file.check_forkable(rloo, grpo)
    config_file.check_forkable(rloo, demo("model.value=reward_model"))
    config_file.check_forkable(demo("lora.rank=8"), demo("lora.rank=8", "seed=1", "kl.beta=0.1"))


def test_adapters_are_scaled_by_two_by_default():
    assert demo("lora.rank=8").lora.alpha == 16
    assert demo("lora.rank=8", "lora.alpha=4").lora.alpha == 4
    assert demo().lora.alpha is None


def test_rank_stabilised_adapters_have_one_default_alpha_for_all_ranks():
    assert [demo(f"lora={{rank: {rank}, rslora: true}}").lora.alpha for rank in (8, 64)] == [16, 16]


def test_held_out_prompts_are_fixed_on_a_resume():
    with pytest.raises(ConfigError, match=r"eval\.holdout"):
        config_file.check_resumable(demo(), demo("eval.holdout=4"))


def test_a_resume_may_change_everything_else():
    config_file.check_resumable(demo(), demo("train.steps=999", "kl.beta=0.1", "ppo.epochs=1"))
    vllm = ("rollout.engine=vllm", "rollout.engines=2", "data.cache=/tmp/c")
    config_file.check_resumable(demo(vllm[0]), demo(*vllm))


def test_changes_are_listed_by_their_dotted_keys():
    assert config_file.changes(demo(), demo("kl.beta=0.25", "train.steps=9")) == {
        "kl.beta": (demo().kl.beta, 0.25),
        "train.steps": (demo().train.steps, 9),
    }


CHANGED = {
    "beta": 0.9, "controller": "fixed", "target": 3.0, "horizon": 500.0, "beta_min": 0.01,
    "beta_max": 2.0, "learning_rate": 3e-4, "save_every": 7, "clip_range": 0.31, "epochs": 5,
    "stop_kl": 0.4, "temperature": 0.8, "max_new_tokens": 33, "clip_range_high": 0.28,
    "dual_clip": 3.0, "entropy_coef": 0.01, "entropy_target": 0.3, "loss_aggregation": "sequence",
    "micro_batch_size": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", LIVE_SETTINGS)
def test_a_live_setting_changes_its_own_key_and_no_other(name):
    changed = change_settings(demo(), {name: CHANGED[name]})
    assert list(config_file.changes(demo(), changed)) == [LIVE_SETTINGS[name]]
    assert getattr(settings_of(changed), name) == CHANGED[name]


def test_settings_of_a_configuration_put_back_into_it_change_nothing():
    assert apply_settings(demo(), settings_of(demo())) == demo()


def test_a_setting_that_was_fixed_once_is_the_configuration_s_in_a_checkpoint_without_it():
    changed = change_settings(demo(), CHANGED)
    of_then = msgspec.structs.asdict(settings_of(changed))
    for name in ONCE_FIXED:
        del of_then[name]
    assert apply_settings(changed, Settings(**of_then)) == changed


def test_the_keys_of_the_objective_keep_the_defaults_of_sessions_without_them():
    config = demo()
    new = {
        "ppo": {"clip_range_high", "dual_clip", "entropy_coef", "entropy_target",
                "loss_aggregation", "lam_value", "lam_alpha", "scale_rewards", "value_init"},
        "kl": {"estimator", "place"},
    }  # fmt: skip
    tree = config_file.to_tree(config)
    for section, keys in new.items():
        for key in keys:
            del tree[section][key]
    assert config_file.from_tree(tree) == config
    old = msgspec.to_builtins(settings_of(config))
    for key in new["ppo"] & old.keys():
        del old[key]
    assert msgspec.convert(old, Settings) == settings_of(config)


def test_a_key_in_the_address_of_a_reward_is_no_part_of_what_the_reward_is():
    one, other = (RewardConfig(service=f"https://box/score?key={key}") for key in ("a", "b"))
    assert one.scored_by == other.scored_by == "service https://box/score"
