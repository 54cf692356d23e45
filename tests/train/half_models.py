"""The starter models with half of their layers, for runs in the test process.

A step of the whole models takes half a second of processor time, and most tests of runs take some.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from engine import starter

LAYERS = 2
"""More than one, since layers have caches of their own."""


def write_half(name: str, folder: Path) -> Path:
    """Writes the first layers of a starter model to a folder; returns the folder of the model."""
    whole, half = starter.FOLDER / name, folder / name
    shutil.copytree(whole, half)
    config = json.loads((whole / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    left_out = tuple(f"model.layers.{i}." for i in range(LAYERS, config["num_hidden_layers"]))
    weights = load_file(whole / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if not key.startswith(left_out)}
    save_file(kept, half / "model.safetensors", {"format": "pt"})
    return half
