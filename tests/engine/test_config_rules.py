"""Values and combinations of keys: what is taken, and what is refused with which reason."""

import re
from typing import get_args, get_type_hints

import msgspec
import pytest

from engine.config import file as config_file
from engine.config.schema import RunConfig
from engine.config.sections.ppo import ADVANTAGES, PPOConfig
from engine.errors import MAX_CONFIG_ERROR, ConfigError
from tests.engine.demo_config import demo

JUDGE = ("reward.model=null", "reward.judge='http://h/v1'", "reward.judging.model=m")
GROUPED = ("reward.model=null", "reward.mix=[{model: a, normalise: group}, {function: 'm:f'}]")
SERVICE = ("reward.model=null", "reward.service='http://h/score'")


def test_all_rules_that_are_broken_are_told_together():
    with pytest.raises(ConfigError) as caught:
        demo("ppo.minibatches=7", "train.final_rate=0.1", "launch.gpus=[0, 0]")
    assert str(caught.value) == (
        "rollout.batch_size (64) must be a multiple of ppo.minibatches (7) (also: train.final_rate "
        "needs train.schedule: linear or cosine: a constant rate does not decay; launch.gpus has "
        "GPU 0 more than once)"
    )


def test_of_many_broken_rules_as_many_are_told_as_can_be_read():
    with pytest.raises(ConfigError) as caught:
        demo(
            "kl.place=loss", "kl.estimator=k1", "ppo.value_rate=2", "ppo.minibatches=7",
            "ppo.policy_loss=dro", "train.final_rate=0.1", "rollout.ahead=1",
        )  # fmt: skip
    text = str(caught.value)
    assert len(text) <= MAX_CONFIG_ERROR
    assert "…" not in text
    assert text.endswith("; and others)")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["reward.model=null", "model.value=reward_model"], "give exactly one of"),
        (["train.best_metric=eval/score"], "train.best_metric is eval/score, which needs"),
        (["environment.call_pattern='(x)'"], "environment.call_pattern needs"),
        (["ppo.advantage=rloo", "ppo.value_init=reward_model"], "needs a value function"),
        (["rollout.ahead=1", "ppo.rollout_correction=mask"], "needs rollout.engine: vllm"),
        ([*JUDGE, "reward.judging.parse='('"], "not a regular expression"),
    ],
)
def test_a_mistake_is_not_repeated_by_rules_that_depend_on_it(overrides, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        demo(*overrides)
    assert "(also" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["reward.model=null", "reward.service=here"], "reward.service must be a URL such as"),
        (["reward.model=null", "reward.service='ftp://h/'"], "must be a URL such as"),
        (["reward.model=null", "reward.service='http://h:x/'"], "must be a URL such as"),
        (["reward.model=null", "reward.service='http://a:secret@h/'"], "a user or a password"),
        (["launch.preempted_exit=2"], "means something else already"),
        (["launch.gpus=[0, 1, 0]"], "launch.gpus has GPU 0 more than once"),
        (
            ["launch.nodes=2", "launch.rendezvous=a:1", "launch.min_nodes=3"],
            "min_nodes (3) must be at most",
        ),
        (["reward.protocol=openrlhf"], "reward.protocol needs reward.service"),
        (["reward.judging.model=m"], "reward.judging needs reward.judge"),
        (["reward.http.timeout=3"], "reward.http needs reward.service or reward.judge"),
        ([*SERVICE, "reward.http.label_column=c"], "needs reward.protocol: openrlhf"),
        ([*SERVICE, "reward.http.token_env=sk-secret"], "the name of an environment variable"),
        ([*JUDGE, "reward.judging.model=null"], "reward.judging.model is missing"),
        ([*JUDGE, "reward.judging.template=Rate it"], "must contain {response}"),
        ([*JUDGE, "reward.judging.parse='('"], "not a regular expression"),
        ([*JUDGE, "reward.judging.parse='[0-9]+'"], "needs a group"),
        ([*JUDGE, "reward.judging.scale=[10, 1]"], "must rise"),
        ([*JUDGE, "reward.judging.options={stream: true}"], "cannot contain stream"),
        (
            ["reward.model=null", "reward.mix=[{function: 'a:b'}]", "reward.http.timeout=3"],
            "move it into reward.mix",
        ),
        (["eval.rewards=[{judge: 'http://h'}]"], "eval.rewards[0].judging.model is missing"),
    ],
)
def test_keys_of_services_and_judges_that_make_no_sense_are_refused(overrides, says):
    with pytest.raises(ConfigError) as caught:
        demo(*overrides)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.reference_revision=v1"], "model.reference_revision needs model.reference"),
        (["model.gguf_file=x.bin"], "must be the name of a .gguf file"),
        (["model.attn_implementation=flash_attention_2"], "set model.dtype: bfloat16"),
        (["model.float32_logits=true"], "has no effect with model.dtype: float32"),
        (["model.attn_implementation=fast"], "must be one of eager, "),
        (["lora.quantise=nf4"], "nf4 needs lora.rank"),
        (["lora.quantise=nf4", "lora.rank=4", "parallel.strategy=fsdp"], "use ddp"),
        (["lora.quantise=nf4", "lora.rank=4", "rollout.engine=vllm"], "use native"),
        (["lora.dora=true", "lora.rank=4", "parallel.strategy=fsdp"], "use ddp"),
        (["parallel.activations=offload"], "needs parallel.activation_checkpointing: true"),
        (["data.template_arguments={tokenize: true}"], "cannot contain tokenize"),
        (
            ["reward.model=null", "reward.function='a:b'", "reward.trust_remote_code=true"],
            "reward.trust_remote_code needs reward.model",
        ),
        (
            ["reward.model=null", "reward.mix=[{function: 'a:b'}]", "reward.pair=true"],
            "move it into reward.mix",
        ),
    ],
)
def test_keys_of_models_and_conversations_that_make_no_sense_are_refused(overrides, says):
    with pytest.raises(ConfigError) as caught:
        demo(*overrides)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "name", ["not-there", "module:", ":function", "a:b:c", "a b:c", "os.system"]
)
def test_a_reward_function_is_written_module_and_function(name):
    with pytest.raises(ConfigError, match="module:function"):
        demo("reward.model=null", f"reward.function='{name}'")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("{alpha: 8}", "lora.alpha needs lora.rank"),
        ("{targets: [q_proj]}", "lora.targets needs lora.rank"),
        ("{rslora: true, dora: true}", "lora.rslora and lora.dora need lora.rank"),
    ],
)
def test_adapters_without_a_rank_are_refused(given, named):
    with pytest.raises(ConfigError, match=named):
        demo(f"lora={given}")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["eval.every=5"], r"eval\.holdout"),
        (["eval.holdout=4", "eval.prompts=a.jsonl"], "not both"),
        (["eval.rewards=[{weight: 1}]"], r"eval\.rewards\[0\] needs exactly one"),
        (["train.best_metric=eval/score"], r"eval\.every"),
        (
            ["train.best_metric=eval/scores", "eval.every=5", "eval.holdout=4"],
            r"no metric .* \(did you mean 'eval/score'\?\)",
        ),
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


LEAST = {
    "kl.beta": 0, "kl.target": 0.001, "kl.horizon": 14, "kl.beta_min": 1e-8, "kl.beta_max": 0.01,
    "train.learning_rate": 1e-10, "train.save_every": 0, "train.adam_eps": 1e-15,
    "ppo.clip_range": 0.001, "ppo.epochs": 1, "ppo.stop_kl": 1e-6, "ppo.max_grad_norm": 1e-3,
    "ppo.clip_range_high": 0.001, "ppo.dual_clip": 1.001, "ppo.entropy_coef": 1e-9,
    "ppo.entropy_target": 1e-9, "ppo.entropy_coef_step": 1e-9, "ppo.entropy_coef_max": 1e-9,
    "ppo.lam_value": 0, "ppo.lam_alpha": 0.001, "kl.estimator": "k2", "kl.place": "reward",
    "ppo.value_head_rate": 0.01, "rollout.temperature": 0.001, "rollout.max_new_tokens": 1,
    "reward.clip": 0.01, "reward.missing_eos_penalty": 0, "train.max_hours": 0.001,
    "launch.silence": 1, "log.samples": 0, "train.ema.decay": 0.01,
}  # fmt: skip
MOST = {
    "kl.beta": 100, "kl.target": 10_000, "kl.horizon": 1e9, "kl.beta_min": 1, "kl.beta_max": 1e4,
    "train.learning_rate": 1, "train.save_every": 10**9, "train.steps": 10**7,
    "train.keep_last": 10**9, "train.weight_decay": 1, "ppo.clip_range": 1, "ppo.epochs": 100,
    "ppo.stop_kl": 1e6, "ppo.max_grad_norm": 1e9, "ppo.micro_batch_size": 10**6,
    "ppo.clip_range_high": 5.0, "ppo.dual_clip": 10, "ppo.entropy_coef": 10,
    "ppo.entropy_target": 100, "ppo.entropy_coef_step": 1, "ppo.entropy_coef_max": 100,
    "ppo.lam_value": 1,
    "ppo.lam_alpha": 10, "reward.overlong.penalty": 100, "rollout.dynamic_limit": 100,
    "ppo.value_head_rate": 1000, "rollout.temperature": 10, "rollout.max_new_tokens": 131_072,
    "rollout.batch_size": 1024, "reward.max_tokens": 10**6, "data.max_prompt_tokens": 10**6,
    "train.ema.decay": 0.9999, "seed": 2**64 - 1, "launch.timeout": 7 * 86_400, "log.arrays": 10**6,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*LEAST.items(), *MOST.items()])
def test_a_value_that_a_person_could_mean_is_taken(key, value):
    node = demo(f"{key}={value}")
    for name in key.split("."):
        node = getattr(node, name)
    assert node == value


def test_every_number_but_a_seed_and_a_metrics_threshold_is_bounded_on_both_sides():
    """A step must not take for ever because of one number; :data:`MOST` says what must pass."""
    free = {"seed", "guardrails.rules.above", "guardrails.rules.below",
            "guardrails.rules.predicted_above", "reward.label",
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
    flat = config_file.to_flat(demo())
    for key in (k for k, v in flat.items() if isinstance(v, float)):
        for word in (".inf", "-.inf", ".nan"):
            with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
                demo(f"{key}={word}")


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
    "a value of no reward model": (
        ["model.value=reward_model", "reward.model=null", "reward.function=m:f"],
        "model.value: reward_model needs exactly one reward model.*not 0",
    ),
    "a fitted value to warm up": (
        ["model.value=reward_model", "ppo.value_warmup=2"], "value_warmup has nothing to train",
    ),
    "a fitted value with dynamic sampling": (
        ["model.value=reward_model", "rollout.dynamic=true", "rollout.per_prompt=2"],
        "rollout.dynamic cannot be combined with model.value",
    ),
    "a buffer longer than a response": (["reward.overlong.buffer=1000"], "must be at most rollout"),
    "a range of nothing": (["rollout.dynamic_range=[0, 1]"], "needs rollout.dynamic: true"),
    "a range that falls": (
        ["rollout.dynamic=true", "rollout.per_prompt=2", "rollout.dynamic_range=[1, 0.5]"],
        "1 is not below 0.5",
    ),
    "a stop that is everywhere": (['rollout.stop=[".", ""]'], "stop must not contain an empty"),
    "a reference without weights of its own": (
        ["kl.reference_update.every=5", "lora.rank=8"], "without its adapters",
    ),
    "an update that changes nothing": (
        ["kl.reference_update.mix=0"], r"kl\.reference_update\.mix must be a number above 0",
    ),
    "nothing to obey": (
        ["reward.model=null", "reward.mix=[{model: a, weight: 0}]"], "weight is not 0",
    ),
    "weights of a KL that is not in the loss": (["kl.importance_weighted=true"], "kl.place: loss"),
    "a deviation of one response": (
        [*GROUPED, "ppo.advantage=reinforce_plus_plus"], "per_prompt of at least 2: one response",
    ),
    "a value of a group": ([*GROUPED, "rollout.per_prompt=4"], "the value function of.*gae"),
    "a greedy response in a group": (
        [*GROUPED, "ppo.advantage=remax", "rollout.per_prompt=4"], "the greedy baseline of.*remax",
    ),
    "two scales of a sum": (
        [*GROUPED, "ppo.advantage=grpo", "reward.normalise=reference"], "reward.normalise cannot",
    ),
    "bounds of a scaled sum": (
        [*GROUPED, "ppo.advantage=grpo", "reward.clip=5"], "reward.clip cannot be combined",
    ),
    "an end of a constant rate": (["train.final_rate=0.1"], "linear or cosine"),
    "a dual clip with cispo": (["ppo.policy_loss=cispo", "ppo.dual_clip=3"], "leave it out"),
    "a clip range with sapo": (["ppo.policy_loss=sapo", "ppo.clip_range_high=0.3"], "them out"),
    "a dual clip with vespo": (
        ["ppo.policy_loss=vespo", "ppo.ratio=sequence", "ppo.dual_clip=3"], "leave them out",
    ),
    "vespo by the ratios of tokens": (["ppo.policy_loss=vespo"], "set ppo.ratio: sequence"),
    "gmpo by the ratios of tokens": (["ppo.policy_loss=gmpo"], "set ppo.ratio: sequence_mean"),
    "a dual clip with gmpo": (
        ["ppo.policy_loss=gmpo", "ppo.ratio=sequence_mean", "ppo.dual_clip=3"], "leave it out",
    ),
    "dppo by the ratio of a response": (
        ["ppo.policy_loss=dppo_tv", "ppo.ratio=sequence"], "set ppo.ratio: token",
    ),
    "dro without a penalty": (["ppo.policy_loss=dro"], "dro and ppo.dro_beta.*need each other"),
    "a penalty without dro": (["ppo.dro_beta=1"], "dro and ppo.dro_beta.*need each other"),
    "a clip range with dro": (
        ["ppo.policy_loss=dro", "ppo.dro_beta=1", "ppo.clip_range_high=0.3"], "leave them out",
    ),
    "two ways for one covariance": (
        ["ppo.clip_cov=0.1", "ppo.kl_cov=0.1"], "leave one of them out",
    ),
    "uncertain tokens of one ratio": (
        ["ppo.top_entropy=0.2", "ppo.ratio=sequence_mean"], "top_entropy cannot leave out single",
    ),
    "tokens left out of one ratio": (
        ["ppo.clip_cov=0.1", "ppo.policy_loss=gmpo", "ppo.ratio=sequence_mean"], "clip_cov cannot",
    ),
    "tokens masked in one ratio": (
        ["ppo.rollout_correction=mask", "ppo.ratio=sequence"], "rollout_correction: mask cannot",
    ),
    "tokens rejected from one ratio": (
        ["ppo.rollout_rejection=token_k3", "ppo.rollout_rejection_limit=1", "ppo.ratio=sequence"],
        "rollout_rejection: token_k3 cannot",
    ),
    "covariances that fall": (["ppo.clip_cov_range=[5, 1]"], "5 is not below 1"),
    "a rate of no transformer": (["ppo.value_rate=10"], "needs model.value: separate"),
    "a rate of no value function": (
        ["ppo.value_rate=10", "model.value=separate", "ppo.advantage=rloo"], "value_rate needs",
    ),
    "a mean of no weights": (
        ["ppo.rollout_correction_normalise=true"], "needs ppo.rollout_correction",
    ),
    "limits of an entropy bonus that cross": (
        ["ppo.entropy_coef_min=2"], r"entropy_coef_min \(2\) must be below",
    ),
    "a gradient of no value function": (
        ["ppo.value_max_grad_norm=1"], "value_max_grad_norm needs model.value: separate",
    ),
    "no scale of no whitening": (
        ["ppo.advantage=rloo", "ppo.whiten_scale=false"], "without ppo.whiten",
    ),
    "a rejection without a limit": (["ppo.rollout_rejection=token_k3"], "need each other"),
    "a limit of no rejection": (["ppo.rollout_rejection_limit=0.01"], "need each other"),
    "a dual clip of 1": (["ppo.dual_clip=1"], r"ppo\.dual_clip must be a number above 1"),
    "an upper clip range of 0": (["ppo.clip_range_high=0"], r"ppo\.clip_range_high must be"),
    "an entropy that is punished": (["ppo.entropy_coef=-1"], r"entropy_coef must be.*at least 0,"),
    "an unknown aggregation": (
        ["ppo.loss_aggregation=mean"],
        "one of sequence, sequence_sum, sequence_sum_constant, token",
    ),
    "an unknown estimator of the KL": (["kl.estimator=k4"], "one of abs, k1, k2, k3"),
    "an unknown place": (["kl.place=value"], "one of loss, reward"),
    "an unknown scale": (["ppo.scale_rewards=std"], "one of batch, group, none"),
    "a lambda above 1": (["ppo.lam_value=1.1"], r"ppo\.lam_value must be.*of at most 1,"),
    "an alpha of 0": (["ppo.lam_alpha=0"], r"ppo\.lam_alpha must be"),
    "a negative penalty": (["reward.overlong.penalty=-1"], r"reward\.overlong\.penalty must be"),
    "an average of the start": (["train.ema.decay=1"], r"train\.ema\.decay must be.*below 1,"),
    "an average of the last": (["train.ema.decay=0"], r"train\.ema\.decay must be.*above 0,"),
    "no average to offload": (["train.ema.offload=true"], r"needs train\.ema\.decay"),
    "no average to compare": (
        ["eval={every: 5, holdout: 8}", "train.best_metric=eval/ema_score"],
        r"needs train\.ema\.decay",
    ),
    "a score of no environment": (
        ["reward={environment: solved}"], r"reward\.environment needs environment\.factory",
    ),
    "an evaluation by no environment": (
        ["eval={every: 5, holdout: 8, rewards: [{environment: solved}]}"],
        r"eval\.rewards\[0\]\.environment needs environment\.factory",
    ),
    "turns without an environment": (["environment.max_turns=3"], r"need environment\.factory"),
    "independent turns of native rollouts": (
        ["environment.tools=['a:b']", "environment.turns=independent"], r"needs rollout\.engine: v",
    ),
    "a tool that is no function": (["environment.tools=['a.py']"], "or a name, not 'a.py'"),
    "a tool of no environment": (["environment.tools=[look]"], r"'look' needs environment\.fac"),
    "tools twice": (
        ["environment.tools=['a:b']", "data.template_arguments={tools: []}"], "give either",
    ),
    "a pattern without a group": (
        ["environment.tools=['a:b']", "environment.call_pattern=x"], "needs one group",
    ),
    "a pattern without tools": (
        ["environment.factory=a:B", "environment.call_pattern=(x)"], r"needs environment\.tools",
    ),
    "an environment that is no name": (
        ["environment.factory=game.py"], "must be written module:name",
    ),
    "a score that is no method": (
        ["environment.factory=a:B", "reward={environment: 'score()'}"], "the name of a method",
    ),
    "values of one turn": (
        ["environment.factory=a:B", "model.value=reward_model"], "shared or separate",
    ),
    "a key that is not there": (["reward.overlong.bufer=1"], r"mean 'reward\.overlong\.buf"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_combinations_that_make_no_sense_are_refused_with_the_reason(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        demo(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.gpus=[1]", "rollout.tensor_parallel=2"], "needs as many GPUs in rollout.gpus"),
        (["rollout.gpus=[6, 7]", "rollout.engines=3"], "needs 3 GPUs, and rollout.gpus has 2"),
        (["rollout.gpus=[6, 7, 7]", "rollout.engines=3"], "rollout.gpus has GPU 7 more than once"),
        (["launch.gpus=[0, 1]", "rollout.engines=2", "rollout.tensor_parallel=2"], "needs 4 GPUs"),
        (["rollout.engines=65"], "must be at most rollout.batch_size (64)"),
        (["rollout.transfer=ipc", "rollout.engines=2"], "needs rollout.engines: 1"),
        (["rollout.joined=2", "rollout.rendezvous=a:1"], "must be at most rollout.engines (1)"),
        (["rollout.joined=1"], "needs rollout.rendezvous: HOST:PORT"),
        (["rollout.joined=1", "rollout.rendezvous=here"], "'here' is not an address"),
        (
            [
                "rollout.joined=1",
                "rollout.rendezvous=a:1",
                "launch.nodes=2",
                "launch.rendezvous=b:1",
            ],
            "needs another port than launch.rendezvous, not 1",
        ),
        (
            ["rollout.joined=1", "rollout.rendezvous=a:1", "rollout.transfer=broadcast"],
            "rollout.joined needs rollout.transfer: file",
        ),
        (["rollout.sleep=1", "launch.device=cpu"], "rollout.sleep needs a GPU"),
        (["rollout.transfer=ipc", "launch.device=cpu"], "rollout.transfer: ipc needs a GPU"),
        (["rollout.transfer=ipc", "rollout.tensor_parallel=2"], "use broadcast with more"),
        (["rollout.transfer=ipc", "rollout.gpus=[1]", "launch.gpus=[0]"], "the GPU of rank 0"),
        (["rollout.transfer=broadcast", "rollout.gpus=[0]", "launch.gpus=[0]"], "one member on a"),
    ],
)
def test_an_engine_without_the_gpus_that_its_keys_need_is_refused(overrides, says):
    demo(*overrides)  # native rollouts have no engine
    with pytest.raises(ConfigError) as caught:
        demo("rollout.engine=vllm", *overrides)
    assert says in str(caught.value)
