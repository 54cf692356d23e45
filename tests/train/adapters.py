"""Adapters in folders, as a fine-tuning with peft leaves them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

LINEAR = ["q_proj", "v_proj", "down_proj"]


def write_adapters(
    base,
    folder,
    *,
    kind=AutoModelForCausalLM,
    named=None,
    tokenizer=True,
    seed=0,
    edit=None,
    **lora,
):
    """Writes adapters with random weights; returns the model with them, in float32.

    Args:
        base: the folder of the base model.
        folder: to write to.
        kind: the Auto class of the base model, and what it is given.
        named: what the adapters call the base model; its folder by default.
        tokenizer: whether the base's tokenizer is saved with them.
        seed: of their weights.
        edit: called with the base model and the tokenizer before the adapters are added.
        lora: of peft's configuration.
    """
    torch.manual_seed(seed)
    options = {} if kind is AutoModelForCausalLM else {"num_labels": 1}
    model = kind.from_pretrained(base, dtype=torch.float32, **options)
    words = AutoTokenizer.from_pretrained(base) if tokenizer else None
    if edit is not None:
        edit(model, words)
    task = "CAUSAL_LM" if kind is AutoModelForCausalLM else "SEQ_CLS"
    given = {"target_modules": LINEAR, "init_lora_weights": False, "r": 4, "lora_alpha": 2}
    adapted = get_peft_model(model, LoraConfig(task_type=task, **(given | lora)))
    adapted.peft_config["default"].base_model_name_or_path = str(named or base)
    adapted.save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)
    return adapted.eval()
