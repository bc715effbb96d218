"""Public calls of PEFT that the split model refuses by name, each with its reason.

``make parity`` writes them into docs/parity.md; ``tests/integration/test_peft_calls.py`` holds that
every other one does to the split model what it does to the whole one.
"""

from __future__ import annotations

import inspect
from typing import Any

import peft.helpers
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

_MERGED = "it writes into base matrices that tenants share; `trunkline export --merge` merges"
_DTYPE = "the next forward says that the trunk's blocks are computed in the trunk's own dtype"
_SERVED = "it reads base matrices: works where the host allows it by `--serve-weights`"

REFUSED: dict[str, str] = {
    "BaseTuner.merge_adapter": _MERGED,
    "BaseTuner.merge_and_unload": _MERGED,
    "helpers.KappaTuneSelector": _SERVED,
    "helpers.find_kappa_target_modules": _SERVED,
    "AdaptionPromptModel.*": "its prompts stand around whole attention layers, counted from the "
    "model's last one; refused before training",
    "PolyModel.*": "its layers draw random numbers in their forward; refused before training",
    "ShadowModel.*": "its adapters are around whole blocks of the trunk; refused before training",
    "TinyLoraModel.*": "its layers hold parameters of all layers, which the trunk cannot count; "
    "refused before training",
    "XLoraModel.*": "it replaces the forward of layers that the trunk computes; refused before "
    "training",
    "Module.bfloat16": _DTYPE,
    "Module.double": _DTYPE,
    "Module.half": _DTYPE,
    "Module.type": _DTYPE,
    "Module.requires_grad_(True)": "base matrices of the trunk are not trained; `(False)` is equal",
}
"""A class with ``.*`` stands for the method itself, which is refused as a whole."""


def public_calls() -> set[str]:
    """Every public call of PEFT's models, tuners and helpers, by the class that defines it."""
    found = {
        f"helpers.{name}"
        for name, value in vars(peft.helpers).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == "peft.helpers"
    }
    tuners = (BaseTuner, *PEFT_TYPE_TO_TUNER_MAPPING.values())
    for walked in (PeftModel, PeftModelForCausalLM, *tuners):
        found |= {
            f"{_owner(walked, name).__name__}.{name}"
            for name in dir(walked)
            if not name.startswith("_")
            and _is_call(inspect.getattr_static(walked, name))
            # What tuners have of torch is as PeftModel has it; transformers adds to torch's class.
            and (_owner(walked, name) is not nn.Module or (walked is PeftModel and _is_torch(name)))
        }
    return found


def is_refused(call: str) -> bool:
    """Whether a call is on the list, by itself or with its class."""
    owner, _, name = call.partition(".")
    return f"{owner}.*" in REFUSED or f"{owner}.{name}" in REFUSED


def _owner(walked: type, name: str) -> type:
    return next(one for one in walked.__mro__ if name in vars(one))


def _is_torch(name: str) -> bool:
    return str(getattr(vars(nn.Module)[name], "__module__", "torch")).startswith("torch")


def _is_call(value: Any) -> bool:
    kinds = (property, classmethod, staticmethod)
    return not inspect.isclass(value) and (callable(value) or isinstance(value, kinds))
