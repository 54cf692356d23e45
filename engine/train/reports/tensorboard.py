"""Writes TensorBoard event files of a run, in addition to the journal."""

import html
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from engine.config.file import flatten, to_tree
from engine.config.schema import RunConfig
from engine.metrics import KL, RLHF_REWARD, SCORE
from engine.protocol.rank_messages import Sample

HEADLINE = (SCORE, KL, RLHF_REWARD)
"""The metrics by which TensorBoard's HParams view compares runs."""


class EventFiles:
    """Writes scalars, the samples as text, and the configuration as hparams."""

    def __init__(self, folder: Path, from_step: int) -> None:
        """Creates a new event file for this attempt.

        Args:
            folder: the session's TensorBoard folder.
            from_step: the last completed step. `purge_step` makes the viewer discard what earlier
                attempts wrote for later steps.
        """
        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def hparams(self, config: RunConfig) -> None:
        """Writes the configuration; call it once per run."""
        tree = to_tree(config)
        del tree["notify"]  # a command may hold a password, and event files are passed around
        flat = flatten(tree)
        values = {k: v if isinstance(v, int | float | bool) else str(v) for k, v in flat.items()}
        # Like SummaryWriter.add_hparams, which would also write a scalar for each metric.
        for summary in hparams(values, dict.fromkeys(HEADLINE, 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def step(self, step: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        """Writes the scalars and samples of one step, and flushes the file."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if samples:
            self._writer.add_text("samples", _table(samples), step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _table(samples: list[Sample]) -> str:
    """A Markdown table. Text is escaped, because the viewer renders HTML in it."""

    def cell(text: str) -> str:
        return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")

    rows = [
        f"| {s.score:.3f} | {s.kl:.3f} | {cell(s.prompt)} | {cell(s.response)} |" for s in samples
    ]
    return "\n".join(["| score | KL | prompt | response |", "|---|---|---|---|", *rows])
