"""Other libraries' names of the configuration keys, to suggest the key for an unknown one.

docs/from-trl.md, docs/from-openrlhf.md and docs/from-verl.md list all of them, and the differences.
"""

_NAMES = {
    "model.policy": "sft_model_path model_name_or_path pretrain lora_adapter_path",
    "model.dtype": "bf16 param_dtype",
    "model.float32_logits": "cast_lm_head_to_fp32",
    "lora.rank": "lora_rank lora_r",
    "lora.alpha": "lora_alpha",
    "lora.targets": "target_modules lora_target_modules",
    "lora.rslora": "use_rslora",
    "lora.dora": "use_dora",
    "data.prompts": "dataset_name prompt_data prompt_dataset train_files",
    "data.column": "input_key prompt_key",
    "data.split": "dataset_train_split",
    "data.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "data.chat": "apply_chat_template",
    "reward.model": "reward_model reward_model_path reward_pretrain",
    "reward.function": "reward_funcs custom_reward_function",
    "reward.mix": "reward_weights multi_objective_aggregation gdpo_reward_keys gdpo_reward_weights",
    "reward.service": "remote_rm_url remote_url",
    "rollout.batch_size": "batch_size train_batch_size rollout_batch_size generation_batch_size",
    "rollout.per_prompt": "num_generations n_samples_per_prompt rloo_k",
    "rollout.max_new_tokens": (
        "max_new_tokens response_length max_completion_length generate_max_len max_response_length"
    ),
    "rollout.temperature": "temperature",
    "rollout.dynamic": "dynamic_filtering_enable",
    "rollout.dynamic_range": "dynamic_filtering_range",
    "rollout.engine": "use_vllm",
    "environment.factory": (
        "environment_factory rollout_func agent_func_path interaction_config_path "
        "agent_loop_config_path multi_turn"
    ),
    "environment.tools": "tools tool_config_path",
    "environment.max_turns": "max_tool_calling_iterations max_assistant_turns max_user_turns",
    "environment.max_tokens": "max_tool_response_length",
    "ppo.advantage": "adv_estimator advantage_estimator",
    "ppo.epochs": "num_ppo_epochs ppo_epochs num_iterations max_epochs",
    "ppo.minibatches": "num_mini_batches steps_per_generation ppo_mini_batch_size",
    "ppo.micro_batch_size": (
        "per_device_train_batch_size micro_train_batch_size micro_batch_size "
        "ppo_micro_batch_size_per_gpu"
    ),
    "ppo.micro_batch_by": (
        "use_dynamic_bsz ppo_max_token_len_per_gpu dynamic_batch_enable max_tokens_per_gpu"
    ),
    "ppo.clip_range": "cliprange eps_clip clip_ratio clip_ratio_low epsilon",
    "ppo.clip_range_high": "epsilon_high clip_ratio_high",
    "ppo.policy_loss": "loss_mode policy_loss_type",
    "ppo.value_clip": "cliprange_value",
    "ppo.value_coef": "vf_coef",
    "ppo.entropy_coef": "entropy_coeff",
    "ppo.entropy_coef_step": "entropy_coef_delta",
    "ppo.entropy_target": "use_adaptive_entropy",
    "ppo.router_coef": "router_aux_loss_coef aux_loss_coef",
    "ppo.lam": "lambd",
    "ppo.clip_cov": "clip_cov_ratio",
    "ppo.kl_cov": "kl_cov_ratio",
    "ppo.kl_cov_coef": "ppo_kl_coef",
    "ppo.top_entropy": "top_entropy_quantile",
    "ppo.off_policy_mask": "off_policy_mask_threshold",
    "ppo.rollout_correction": "vllm_importance_sampling_mode is_correction_type rollout_is",
    "ppo.rollout_rejection": "rollout_rs",
    "ppo.rollout_rejection_limit": "rollout_rs_threshold",
    "ppo.rollout_correction_normalise": "rollout_is_batch_normalize",
    "ppo.max_grad_norm": "max_norm grad_clip",
    "ppo.loss_aggregation": "loss_type loss_agg_mode",
    "kl.beta": "kl_coef init_kl_coef init_coef kl_loss_coef coef",
    "kl.target": "target_kl kl_target",
    "kl.estimator": "kl_estimator kl_loss_type",
    "train.steps": (
        "total_episodes num_train_epochs max_steps num_episodes total_training_steps total_epochs"
    ),
    "train.learning_rate": "lr actor_learning_rate",
    "train.schedule": "lr_scheduler_type lr_scheduler",
    "train.final_rate": "min_lr_ratio min_lr_rate",
    "train.save_every": "save_steps save_freq",
    "train.keep_last": "save_total_limit max_ckpt_num",
    "eval.every": "eval_steps test_freq",
    "log.trackers": "report_to logger",
    "parallel.activations": "activation_offloading",
    "parallel.activation_checkpointing": "gradient_checkpointing enable_gradient_checkpointing",
}

KEYS_HERE = {name: key for key, names in _NAMES.items() for name in names.split()}
"""The last part of a name → the key here. Names that several sections have are the rollout's."""

SECTIONS = frozenset(
    {"actor", "critic", "algo", "algorithm", "actor_rollout_ref", "trainer", "ref"}
)
"""Sections that exist only in OpenRLHF or verl."""
