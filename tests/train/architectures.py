"""Architectures of transformers, as tiny models with random weights."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine import starter

VOCABULARY = 4096
SIZE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 6}
"""Shorter than prompt and response, so that it matters."""
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": SIZE,
    "gptj": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "rotary_dim": 4},
    "opt": {**SIZE, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "bloom": {**SIZE, "n_layer": 2, "n_head": 2},
    "falcon": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "multi_query": True,
        "parallel_attn": True, "alibi": False, "bos_token_id": 0, "eos_token_id": 0,
    },
    "llama": {**SIZE, "eos_token_id": [0, 1]},
    "mistral": {**SIZE, **WINDOW},
    "mixtral": {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**SIZE, "tie_word_embeddings": True},
    "qwen3": SIZE,
    "qwen3_moe": {**SIZE, **EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma2": {**SIZE, **WINDOW, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **SIZE, **WINDOW, "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {**SIZE, "sliding_window": None},
    "olmo2": SIZE,
    "qwen3_5_text": {**SIZE, **DELTA_NET},
    "qwen3_next": {
        **SIZE, **DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "lfm2": {**SIZE, "layer_types": ["conv", "full_attention"], "block_ff_dim": 32},
    "granitemoehybrid": {
        **SIZE, **MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
        "num_experts_per_tok": 1, "shared_intermediate_size": 32,
    },
    "jamba": {
        **SIZE, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
}  # fmt: skip


def write_model(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: object
) -> Path:
    """A tiny model that reads the starter's tokens; its weights are large enough to matter.

    `changes` are of its configuration.
    """
    torch.manual_seed(0)
    shape = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **ARCHITECTURES[kind] | changes)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.to(dtype)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(starter.resolve("starter:policy")).save_pretrained(folder)
    return folder
