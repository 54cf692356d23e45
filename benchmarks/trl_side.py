"""TRL's PPOTrainer as a side.

    python -m benchmarks.trl_side FOLDER TASK_AS_JSON [bf16]

Gradient checkpointing and completions for display, both on by default in TRL, are off: the first
would cost it a forward pass an epoch, the second an evaluation. Everything else is its own way.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.side import Child


class Turns(TrainerCallback):
    """Lets the trainer go on when it is its turn."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def on_train_begin(self, *_args: Any, **_named: Any) -> None:
        """Models are loaded and placed."""
        self._child.ready()
        self._child.wait()

    def on_step_end(self, *_args: Any, **_named: Any) -> None:
        """One iteration is over."""
        self._child.done({})
        self._child.wait()


def main() -> None:
    """Iterates as it is told."""
    child = Child()
    folder, task = Path(sys.argv[1]), json.loads(sys.argv[2])
    # The weights' float32 stays; what is asked for is autocast.
    half = "bf16" in sys.argv[3:]
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    rows = [json.loads(x) for x in (folder / "prompts.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"input_ids": tokenizer(r["prompt"])["input_ids"]} for r in rows])
    float32 = {"dtype": torch.float32}
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", **float32)
    reference = AutoModelForCausalLM.from_pretrained(folder / "policy", **float32)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / name, num_labels=1, **float32)
        for name in ("value", "reward")
    )
    with tempfile.TemporaryDirectory() as out:
        settings = PPOConfig(
            output_dir=out,
            per_device_train_batch_size=task["micro_batch"],
            gradient_accumulation_steps=task["prompts"] // task["micro_batch"],
            num_mini_batches=task["minibatches"],
            num_ppo_epochs=task["epochs"],
            local_rollout_forward_batch_size=task["prompts"],
            response_length=task["new_tokens"],
            temperature=1.0,
            learning_rate=1e-5,
            total_episodes=1000 * task["prompts"],
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=half,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Turns(child)],
        ).train()


if __name__ == "__main__":
    main()
