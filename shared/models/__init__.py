"""The parts of a split model and how they are loaded."""

from shared.models.checkpoint import Checkpoint, open_checkpoint
from shared.models.families import FAMILIES, Family, family_of
from shared.models.loading import load_part
from shared.models.parts import (
    GPT2BottomModel,
    GPT2TopModel,
    GPT2TrunkModel,
    build_part,
    get_part_class,
)
from shared.models.split_range import SplitRange

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Family",
    "GPT2BottomModel",
    "GPT2TopModel",
    "GPT2TrunkModel",
    "SplitRange",
    "build_part",
    "family_of",
    "get_part_class",
    "load_part",
    "open_checkpoint",
]
