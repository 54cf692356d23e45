"""Three responses for tests of reward sources."""

from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.rewards.source import RewardInputs

TEXTS = [" was great.", " was bad, and long, and bad again.", " is"]


def three_responses(tokenizer):
    """The last one was cut off; the data has a column `gold`, which counts from 0."""
    eos = tokenizer.eos_token_id
    ids = [tokenizer(t)["input_ids"] + ([eos] if i < 2 else []) for i, t in enumerate(TEXTS)]
    rows = [{"prompt": "The film", "gold": i} for i in range(3)]
    prompts = [Prompt(tokenizer("The film")["input_ids"], "The film", r) for r in rows]
    return RewardInputs(batch_prompts(prompts, 1, 0), ids, list(TEXTS), [True, True, False], step=7)
