"""Copies the recipes of examples/ into the package: ``python -m scripts.recipe_files``.

A test compares the copies with the examples.
"""

import shutil
from pathlib import Path

from engine import starter
from engine.config.recipes import RECIPES

EXAMPLES = Path(__file__).parent.parent / "examples"


if __name__ == "__main__":
    for recipe in RECIPES.values():
        if recipe.file.parent != starter.FOLDER:  # the starter run is no example
            shutil.copyfile(EXAMPLES / recipe.file.name, recipe.file)
