"""Language models that are loaded and placed on the one rank of a test."""

from engine.config.sections.launch import LaunchConfig
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import place_model
from engine.train.models.pretrained import load_lm

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))


def loaded_lm(source):
    """A language model of a folder, in float32."""
    lm = load_lm(str(source), "model.policy", SINGLE_RANK)
    place_model(lm, SINGLE_RANK, "ddp")
    return lm
