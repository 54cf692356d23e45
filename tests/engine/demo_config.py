"""The demo's configuration with overrides, for tests of keys."""

from engine import starter
from engine.config import file as config_file

DEMO = starter.FOLDER / "demo.yaml"


def demo(*overrides):
    """Loads it."""
    return config_file.load(DEMO, overrides)
