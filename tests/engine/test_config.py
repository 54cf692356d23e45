"""The configuration: what is taken, what is refused and in what words."""

import math
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import starter
from engine.config import file as config_file
from engine.config.schema import ADVANTAGES, PPOConfig, RunConfig
from engine.config.settings import (
    LIVE_SETTINGS,
    Settings,
    apply_settings,
    change_settings,
    settings_of,
)
from engine.config.yaml_document import parse_yaml
from engine.errors import ConfigError
from engine.launch.start import check_inputs

modest = settings(max_examples=50, deadline=None, derandomize=True)
DEMO = starter.FOLDER / "demo.yaml"
WORDS = st.text(st.characters(codec="utf-8"), max_size=40)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda child: st.lists(child, max_size=3) | st.dictionaries(WORDS, child, max_size=3),
    max_leaves=8,
)


def demo(*overrides):
    return config_file.load(DEMO, overrides)


@modest
@given(st.sampled_from(config_file.known_keys()), TREES)
def test_any_value_of_any_key_is_taken_or_refused_in_one_sentence(key, value):
    tree = config_file.to_tree(demo())
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    try:
        assert isinstance(config_file.from_tree(tree), RunConfig)
    except ConfigError as error:
        assert str(error)


@modest
@given(WORDS)
def test_any_override_is_taken_or_refused(text):
    try:
        demo(text)
    except ConfigError as error:
        assert str(error)


@modest
@given(WORDS)
def test_any_text_is_yaml_or_refused_naming_where(text):
    try:
        parse_yaml(text, "here")
    except ConfigError as error:
        assert str(error).startswith("here")


@modest
@given(TREES)
def test_any_document_is_a_configuration_or_refused(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError):
        config_file.load(path)


SCALARS = st.one_of(
    WORDS,
    st.sampled_from([
        "*a", "&a", "&a x", "!!timestamp x", "!!int ''", "!!float x", "!!bool x", "!!binary é",
        "!!null x", "!!set {a}", "!!omap [a]", "!!python/object:os.system x", "2020-13-45", "~",
        '"\\ud800"', '"\\0"', '"\\x1b[31m"', "1" * 5000, ".nan", "-.inf", "0x", "1:99", "<<", "=",
        "x" * 300, "./" + "y" * 300, "a: b: c", "? [x]", "starter:policy", "1e-5", "- ",
    ]),
)  # fmt: skip
DOCUMENTS = st.recursive(
    SCALARS,
    lambda child: st.one_of(
        st.lists(child, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(child, max_size=4).map(lambda items: f"&a [{', '.join(items)}, *a]"),
        st.lists(
            st.tuples(st.one_of(st.sampled_from(["model", "<<", "1", "ppo"]), child), child),
            max_size=4,
        ).map(lambda pairs: "&a {" + ", ".join(f"{k}: {v}" for k, v in pairs) + "}"),
    ),
    max_leaves=12,
)


@modest
@given(st.sampled_from([k for k in config_file.known_keys() if k != "notify.command"]), DOCUMENTS)
def test_any_yaml_at_any_key_is_taken_or_refused_in_one_line(tmp_path_factory, key, text):
    *sections, last = key.split(".")
    lines = [f"{'  ' * i}{name}:" for i, name in enumerate(sections)]
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    value = f"{'  ' * len(sections)}{last}: {text}"
    path.write_text("\n".join([*lines, value]), encoding="utf-8", errors="surrogatepass")
    for load in (lambda: config_file.load(path), lambda: demo(f"{key}={text}")):
        try:
            config = load()
        except ConfigError as error:
            assert 0 < len(str(error)) < 1000
        else:
            path.write_text(config_file.dump(config), encoding="utf-8")
            assert config_file.load(path) == config


BOMB = "\n".join(
    ["a0: &a0 {x: 1}"]
    + [f"a{i}: &a{i}\n  k{i}: {i}\n  <<: [{', '.join(f'*a{i - 1}' for _ in range(9))}]"
       for i in range(1, 28)]
)  # fmt: skip
LAUGHS = "\n".join(
    ["a0: &a0 [1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 28)]
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "merge keys"),
        (LAUGHS, "too large or contains itself"),
        ("model: &a [*a]", "too large or contains itself"),
        ("1: 2", "a key must be text, not 1"),
        ("model: {policy: x}\nnull: 3", "a key must be text, not None"),
        ("seed: !!timestamp x", "a value does not fit its tag"),
        ('model: {policy: "\\ud800"}', "model.policy is not valid Unicode text"),
        ('model: {policy: "a\\0b"}', "model.policy contains a NUL character"),
        (f"? {'x' * 20_000}\n: 3", "unknown key"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_documents_are_refused_at_once_in_one_readable_line(tmp_path, text, problem):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as caught:
        config_file.load(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["a loop of links", "a long name", "NUL"])
def test_a_path_that_cannot_be_opened_is_refused_in_one_line(tmp_path, kind):
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    path = {"a loop of links": loop, "a long name": tmp_path / ("x" * 300), "NUL": "a\0b"}[kind]
    with pytest.raises(ConfigError, match="cannot read"):
        config_file.load(Path(path))
    if kind != "NUL":
        with pytest.raises(ConfigError, match=r"data\.prompts"):
            check_inputs(demo(f"data.prompts={path}"))


def test_text_that_looks_like_a_number_is_written_in_quotes(tmp_path):
    config = demo("data.column='1e5'")
    path = tmp_path / "config.yaml"
    path.write_text(config_file.dump(config), encoding="utf-8")
    assert config_file.load(path).data.column == "1e5"


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
    assert config_file.known_keys() == [
        key for key in config_file.known_keys() if key in config_file.flatten(stated)
    ]


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


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("ppo.epocs=2", "unknown key 'ppo.epocs'; did you mean 'ppo.epochs'?"),
        ("epochs=2", "unknown key 'epochs'; did you mean 'ppo.epochs'?"),
        ("ppo.epochs=0", "ppo.epochs must be a whole number >= 1 (it is 0)"),
        (
            "ppo.epochs=18446744073709551615",
            "ppo.epochs must be a whole number <= 1000 (it is 18446744073709551615)",
        ),
        (
            "train.learning_rate=5e-324",
            "train.learning_rate must be a number >= 1e-12 (it is 5e-324)",
        ),
        ("kl.beta=1" + "0" * 400, "kl.beta must be a finite number (it is 1000"),
        ("ppo.epochs=1.5", "ppo.epochs must be a whole number, got a number (it is 1.5)"),
        ("seed=true", "seed must be a whole number, got true or false (it is True)"),
        ("kl.controller=off", "kl.controller must be"),
        ("kl.beta_min=20", "kl.beta_min (20.0) must be below kl.beta_max (10.0)"),
        ("kl.horizon=10", "kl.horizon (10) is too small for rollout.batch_size (64)"),
        ("rollout.batch_size=63", "must be a multiple of ppo.minibatches (2)"),
        ("rollout.per_prompt=3", "must be a multiple of rollout.per_prompt (3)"),
        ("reward.function=a:b", "exactly one of reward.model, reward.function and reward.mix"),
        ("reward.model=null", "(given: none)"),
        ("train.learning_rate=.inf", "train.learning_rate must be a finite number (it is inf)"),
        ("train.learning_rate=.nan", "train.learning_rate must be"),
        ("kl=5", "kl must be a section of keys"),
        ("kl.beta.deep=1", "unknown key 'kl.beta.deep'"),
        ("guardrails.rules=[{name: a, metric: b, bove: 1}]", "rules[0].bove"),
        ("guardrails.rules=[{name: a, metric: b, above: 1, of: c}]", ".of must be one of"),
        ("reward.mix=[{model: a}, {}]", "exactly one of"),
        ("data.prompts=2020-13-45", "-o data.prompts: month must be in 1..12"),
        pytest.param("kl.beta=" + "[" * 5000, "-o kl.beta: ", id="deep"),
        pytest.param("seed=" + "9" * 5000, "-o seed: ", id="long"),
    ],
)
def test_a_wrong_line_is_told_in_one_sentence(override, says):
    with pytest.raises(ConfigError) as caught:
        demo(override)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "name", ["not-there", "module:", ":function", "a:b:c", "a b:c", "os.system"]
)
def test_a_reward_function_is_written_module_and_function(name):
    with pytest.raises(ConfigError, match="module:function"):
        demo("reward.model=null", f"reward.function='{name}'")


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
    changed = config_file.override(loaded, ["data.prompts=q.csv"])
    assert changed.data.prompts == str(tmp_path / "q.csv")
    assert Path(changed.model.policy).parent.name == "there"


def test_a_home_nobody_has_is_left_to_be_refused_as_a_folder():
    assert demo("model.policy=~nobody-at-all/x").model.policy == "~nobody-at-all/x"


@pytest.mark.parametrize(
    "key", ["seed=1", "data.shuffle=false", "model.value=separate", "rollout.batch_size=32"]
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


def test_a_fork_may_change_everything_but_the_adapters():
    config_file.check_forkable(demo("lora.rank=8"), demo("lora.rank=8", "seed=1", "kl.beta=0.1"))


def test_adapters_are_scaled_by_two_unless_told_otherwise():
    assert demo("lora.rank=8").lora.alpha == 16
    assert demo("lora.rank=8", "lora.alpha=4").lora.alpha == 4
    assert demo().lora.alpha is None


@pytest.mark.parametrize("key", ["alpha=8", "targets=[q_proj]"])
def test_adapters_without_a_rank_are_refused(key):
    with pytest.raises(ConfigError, match=r"need lora\.rank"):
        demo(f"lora.{key}")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["eval.every=5"], r"eval\.holdout"),
        (["eval.holdout=4", "eval.prompts=a.jsonl"], "not both"),
        (["eval.rewards=[{weight: 1}]"], r"eval\.rewards\[0\] needs exactly one"),
        (["train.best_metric=eval/score"], r"eval\.every"),
        (["train.best_metric=eval/scores", "eval.every=5", "eval.holdout=4"], "no metric"),
        (
            ["train.best_metric=eval/score", "eval.every=3", "eval.holdout=4"],
            r"multiple of eval\.every",
        ),
        (["train.stop_at={metric: objective/kl}"], "above and below"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(overrides, named):
    with pytest.raises(ConfigError, match=named):
        demo(*overrides)


def test_held_out_prompts_are_fixed_on_a_resume():
    with pytest.raises(ConfigError, match=r"eval\.holdout"):
        config_file.check_resumable(demo(), demo("eval.holdout=4"))


def test_a_resume_may_change_everything_else():
    config_file.check_resumable(demo(), demo("train.steps=999", "kl.beta=0.1", "ppo.epochs=1"))


def test_changes_are_listed_by_their_dotted_keys():
    assert config_file.changes(demo(), demo("kl.beta=0.25", "train.steps=9")) == {
        "kl.beta": (demo().kl.beta, 0.25),
        "train.steps": (demo().train.steps, 9),
    }


LEAST = {
    "kl.beta": 0, "kl.target": 0.001, "kl.horizon": 14, "kl.beta_min": 1e-8, "kl.beta_max": 0.01,
    "train.learning_rate": 1e-10, "train.save_every": 0, "train.adam_eps": 1e-15,
    "ppo.clip_range": 0.001, "ppo.epochs": 1, "ppo.stop_kl": 1e-6, "ppo.max_grad_norm": 1e-3,
    "ppo.clip_range_high": 0.001, "ppo.dual_clip": 1.001, "ppo.entropy_coef": 1e-9,
    "ppo.lam_value": 0, "ppo.lam_alpha": 0.001, "kl.estimator": "k2", "kl.place": "reward",
    "ppo.value_head_rate": 0.01, "rollout.temperature": 0.001, "rollout.max_new_tokens": 1,
    "reward.clip": 0.01, "reward.missing_eos_penalty": 0, "train.max_hours": 0.001,
    "launch.silence": 1, "log.samples": 0,
}  # fmt: skip
MOST = {
    "kl.beta": 100, "kl.target": 10_000, "kl.horizon": 1e9, "kl.beta_min": 1, "kl.beta_max": 1e4,
    "train.learning_rate": 1, "train.save_every": 10**9, "train.steps": 10**7,
    "train.keep_last": 10**9, "train.weight_decay": 1, "ppo.clip_range": 0.99, "ppo.epochs": 100,
    "ppo.stop_kl": 1e6, "ppo.max_grad_norm": 1e9, "ppo.micro_batch_size": 10**6,
    "ppo.clip_range_high": 5.0, "ppo.dual_clip": 10, "ppo.entropy_coef": 10, "ppo.lam_value": 1,
    "ppo.lam_alpha": 10, "reward.overlong.penalty": 100, "rollout.dynamic_limit": 100,
    "ppo.value_head_rate": 1000, "rollout.temperature": 10, "rollout.max_new_tokens": 131_072,
    "rollout.batch_size": 1024, "reward.max_tokens": 10**6, "data.max_prompt_tokens": 10**6,
    "seed": 2**64 - 1, "launch.timeout": 7 * 86_400, "log.arrays": 10**6,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*LEAST.items(), *MOST.items()])
def test_a_value_that_a_person_could_mean_is_taken(key, value):
    node = demo(f"{key}={value}")
    for name in key.split("."):
        node = getattr(node, name)
    assert node == value


def test_every_number_but_a_seed_and_a_metrics_threshold_is_bounded_on_both_sides():
    """A step must not take for ever because of one number; :data:`MOST` says what must pass."""
    free = {"seed", "guardrails.rules.above", "guardrails.rules.below", "reward.label",
            "reward.mix.label", "eval.rewards.label", "eval.seed", "train.stop_at.above",
            "train.stop_at.below"}  # fmt: skip
    unbounded = set()

    def look(kind, key):
        match kind:
            case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
                low = kind.ge if kind.ge is not None else kind.gt
                high = kind.le if kind.le is not None else kind.lt
                if (low is None or high is None) and key not in free:
                    unbounded.add(key)
            case msgspec.inspect.StructType():
                for field in kind.fields:
                    look(field.type, f"{key}.{field.encode_name}".lstrip("."))
            case msgspec.inspect.UnionType():
                for choice in kind.types:
                    look(choice, key)
            case msgspec.inspect.TupleType():
                for item in kind.item_types:
                    look(item, key)
            case msgspec.inspect.ListType():
                look(kind.item_type, key)

    look(msgspec.inspect.type_info(RunConfig), "")
    assert not unbounded


CHANGED = {
    "beta": 0.9, "controller": "fixed", "target": 3.0, "horizon": 500.0, "beta_min": 0.01,
    "beta_max": 2.0, "learning_rate": 3e-4, "save_every": 7, "clip_range": 0.31, "epochs": 5,
    "stop_kl": 0.4, "temperature": 0.8, "max_new_tokens": 33, "clip_range_high": 0.28,
    "dual_clip": 3.0, "entropy_coef": 0.01, "loss_aggregation": "sequence",
}  # fmt: skip


@pytest.mark.parametrize("name", LIVE_SETTINGS)
def test_a_live_setting_changes_its_own_key_and_no_other(name):
    changed = change_settings(demo(), {name: CHANGED[name]})
    assert list(config_file.changes(demo(), changed)) == [LIVE_SETTINGS[name]]
    assert getattr(settings_of(changed), name) == CHANGED[name]


def test_settings_of_a_configuration_put_back_into_it_change_nothing():
    assert apply_settings(demo(), settings_of(demo())) == demo()


def test_the_advantage_key_takes_the_estimators_of_the_table_and_no_others():
    assert get_args(get_type_hints(PPOConfig)["advantage"]) == tuple(ADVANTAGES)
    with pytest.raises(ConfigError, match=f"one of {', '.join(sorted(ADVANTAGES))}"):
        demo("ppo.advantage=no-such-estimator")


@pytest.mark.parametrize("name", ADVANTAGES)
def test_what_an_estimator_declares_fills_in_the_keys_left_out(name):
    config = demo(f"ppo.advantage={name}")
    assert config.ppo.whiten == ADVANTAGES[name].whiten
    assert config.rollout.per_prompt == ADVANTAGES[name].per_prompt
    least = ADVANTAGES[name].least_per_prompt
    if least > 1:
        with pytest.raises(
            ConfigError, match=f"must be at least {least} for ppo.advantage: {name}"
        ):
            demo(f"ppo.advantage={name}", f"rollout.per_prompt={least - 1}")


def test_nothing_that_is_not_finite_gets_through():
    flat = config_file.flatten(config_file.to_tree(demo()))
    for key in (k for k, v in flat.items() if isinstance(v, float)):
        for word, value in ((".inf", math.inf), ("-.inf", -math.inf), (".nan", math.nan)):
            with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
                demo(f"{key}={word}")
            assert not math.isfinite(value)


REFUSED = {
    "k1 in the loss": (["kl.place=loss"], "zero in expectation"),
    "a group of one": (["ppo.advantage=grpo", "rollout.per_prompt=1"], "at least 2 for ppo.adv"),
    "one response to redraw": (["rollout.dynamic=true"], "one response has no variance"),
    "a value function of its own": (["ppo.value_init=reward_model"], "needs model.value: separate"),
    "no value function": (
        ["ppo.value_init=reward_model", "ppo.advantage=grpo"], "ppo.advantage: grpo has none",
    ),
    "a value function with adapters": (
        ["ppo.value_init=reward_model", "model.value=separate", "lora.rank=8"], "lora.rank",
    ),
    "no reward model": (
        ["ppo.value_init=reward_model", "model.value=separate", "reward.model=null",
         "reward.function=m:f"], "exactly one reward model.*not 0",
    ),
    "a buffer longer than a response": (["reward.overlong.buffer=1000"], r"may be.*at most"),
    "a reference without weights of its own": (
        ["kl.reference_update.every=5", "lora.rank=8"], "without its adapters",
    ),
    "an update that changes nothing": (
        ["kl.reference_update.mix=0"], r"kl\.reference_update\.mix must be a number > 0",
    ),
    "nothing to obey": (
        ["reward.model=null", "reward.mix=[{model: a, weight: 0}]"], "weight is not 0",
    ),
    "a dual clip of 1": (["ppo.dual_clip=1"], r"ppo\.dual_clip must be a number > 1"),
    "an upper clip range of 0": (["ppo.clip_range_high=0"], r"ppo\.clip_range_high must be"),
    "an entropy that is punished": (["ppo.entropy_coef=-1"], r"ppo\.entropy_coef must be.*>= 0"),
    "an unknown aggregation": (
        ["ppo.loss_aggregation=mean"], "one of sequence, sequence_sum_constant, token",
    ),
    "an unknown estimator of the KL": (["kl.estimator=k4"], "one of k1, k2, k3"),
    "an unknown place": (["kl.place=value"], "one of loss, reward"),
    "an unknown scale": (["ppo.scale_rewards=std"], "one of batch, group, none"),
    "a lambda above 1": (["ppo.lam_value=1.1"], r"ppo\.lam_value must be.*<= 1"),
    "an alpha of 0": (["ppo.lam_alpha=0"], r"ppo\.lam_alpha must be"),
    "a negative penalty": (["reward.overlong.penalty=-1"], r"reward\.overlong\.penalty must be"),
    "a key that is not there": (["reward.overlong.bufer=1"], r"mean 'reward\.overlong\.buf"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        demo(*overrides)
    assert "\n" not in str(caught.value)


def test_the_keys_of_the_objective_keep_the_defaults_of_sessions_without_them():
    config = demo()
    new = {
        "ppo": {"clip_range_high", "dual_clip", "entropy_coef", "loss_aggregation", "lam_value",
                "lam_alpha", "scale_rewards", "value_init"},
        "kl": {"estimator", "place"},
    }  # fmt: skip
    tree = config_file.to_tree(config)
    for section, keys in new.items():
        for key in keys:
            del tree[section][key]
    assert config_file.from_tree(tree) == config
    old = msgspec.to_builtins(settings_of(config))
    for key in ("clip_range_high", "dual_clip", "entropy_coef", "loss_aggregation"):
        del old[key]
    assert msgspec.convert(old, Settings) == settings_of(config)
