"""TensorBoard event files of a run, beside the journal, for those who use its viewers."""

import html
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from engine.config.file import flatten, to_tree
from engine.config.schema import RunConfig
from engine.metrics import KL, RLHF_REWARD, SCORE
from engine.protocol.rank_messages import Sample

HEADLINE = (SCORE, KL, RLHF_REWARD)
"""What the hparams view compares runs by."""


class EventFiles:
    """Writes scalars, the answers as text, and the configuration as hparams."""

    def __init__(self, folder: Path, from_step: int) -> None:
        """Opens a file of its own for this attempt.

        `purge_step` makes the viewer drop what an earlier attempt wrote for the same steps.
        """
        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def hparams(self, config: RunConfig) -> None:
        """The configuration, once a run."""
        flat = flatten(to_tree(config))
        values = {k: v if isinstance(v, int | float | bool) else str(v) for k, v in flat.items()}
        # The parts of SummaryWriter.add_hparams, without the scalar it would write for each metric.
        for summary in hparams(values, dict.fromkeys(HEADLINE, 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def step(self, step: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        """One step's scalars and answers."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if samples:
            self._writer.add_text("samples", _table(samples), step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def _table(samples: list[Sample]) -> str:
    """A Markdown table; answers are escaped, a viewer would render what stands in them."""

    def cell(text: str) -> str:
        return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")

    rows = [
        f"| {s.score:.3f} | {s.kl:.3f} | {cell(s.prompt)} | {cell(s.response)} |" for s in samples
    ]
    return "\n".join(["| score | KL | prompt | response |", "|---|---|---|---|", *rows])
