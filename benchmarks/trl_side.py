"""TRL's PPOTrainer as a side of a comparison.

    python -m benchmarks.trl_side FOLDER TASK_AS_JSON [bf16]

Gradient checkpointing and sample completions are on by default in TRL and are off here: they would
cost TRL one forward pass per epoch and an evaluation. All other settings are TRL's defaults or
follow from the task.
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


class WaitForRequest(TrainerCallback):
    """Makes the trainer wait for a request before each iteration."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def on_train_begin(self, *_args: Any, **_named: Any) -> None:
        """Called when the models are loaded."""
        self._child.ready()
        self._child.wait()

    def on_step_end(self, *_args: Any, **_named: Any) -> None:
        """Called at the end of an iteration."""
        self._child.done({})
        self._child.wait()


def main() -> None:
    """Loads the models and does one iteration per request of the parent."""
    child = Child()
    folder, task = Path(sys.argv[1]), json.loads(sys.argv[2])
    # bf16 enables autocast; the weights stay float32.
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
            callbacks=[WaitForRequest(child)],
        ).train()


if __name__ == "__main__":
    main()
