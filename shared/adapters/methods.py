"""The PEFT methods a split model takes: one row each, with where it can work and what may be set.

A field that is not in a row never reaches PEFT on a trunk. PEFT has fields that rewrite base
weights (PiSSA, OLoRA, LoftQ initialisation), that import a module by name (``megatron_core``) or a
tokenizer (``tokenizer_kwargs``), or that change the model's layers; a trunk shares its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import AdapterError

PARTS = ("all", "bottom", "trunk", "top", "ends")
"""Where an adapter can be put: everywhere, on one part, or on bottom and top."""

_COMMON = frozenset({"peft_type", "task_type", "inference_mode", "modules_to_save"})
_TARGETS = frozenset({"target_modules", "exclude_modules", "fan_in_fan_out"})
_LAYERS = frozenset({"layers_to_transform", "layers_pattern"})

_LORA = _TARGETS | _LAYERS | {"r", "lora_alpha", "lora_dropout", "init_lora_weights"}
_LORA_ONLY = frozenset({"use_rslora", "use_dora", "rank_pattern", "alpha_pattern"})
_ADALORA = frozenset(
    {
        "target_r",
        "init_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "rank_pattern",
    }
)
_IA3 = _TARGETS | {"feedforward_modules", "init_ia3_weights"}
_PREFIX = frozenset({"num_virtual_tokens", "encoder_hidden_size", "prefix_projection"})
_PROMPT = frozenset(
    {
        "num_virtual_tokens",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
    }
)
_P_TUNING = frozenset(
    {
        "num_virtual_tokens",
        "encoder_reparameterization_type",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
    }
)

_AT_THE_BOTTOM = (
    "its virtual tokens enter the model as embeddings, before the first block: it works on the "
    "bottom alone (parts 'all', 'ends' and 'bottom' are the same)"
)
_EVERY_BLOCK = (
    "its prefix is one tensor over every block of the model, which has no way to leave blocks out: "
    "accepted is 'all'"
)


@dataclass(frozen=True)
class Method:
    """One PEFT method on a split model."""

    name: str
    """As PEFT writes it."""
    fields: frozenset[str]
    """What may differ from PEFT's defaults."""
    parts: tuple[str, ...] = PARTS
    why_not: str = ""
    """Why the other parts are refused."""
    on_trunk: bool = True
    """Whether a trunk ever sees it."""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("LORA", _COMMON | _LORA | _LORA_ONLY),
        Method("ADALORA", _COMMON | _LORA | _ADALORA),
        Method("IA3", _COMMON | _IA3),
        Method("PREFIX_TUNING", _COMMON | _PREFIX, ("all",), _EVERY_BLOCK),
        Method(
            "PROMPT_TUNING",
            _COMMON | _PROMPT,
            ("all", "bottom", "ends"),
            _AT_THE_BOTTOM,
            on_trunk=False,
        ),
        Method(
            "P_TUNING",
            _COMMON | _P_TUNING,
            ("all", "bottom", "ends"),
            _AT_THE_BOTTOM,
            on_trunk=False,
        ),
    )
}

DERIVED_FIELDS = frozenset(
    {"num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules"}
)
"""What PEFT fills in from the model it wraps; never taken from a configuration."""


def accepted_methods() -> list[str]:
    """Names of the PEFT methods a trunk takes, as PEFT writes them."""
    return sorted(name for name, method in METHODS.items() if method.on_trunk)


def method_of(peft_type: object) -> Method:
    """Returns the row of a PEFT type.

    Raises:
        AdapterError: If a split model does not take it; names those it takes.
    """
    name = str(getattr(peft_type, "value", peft_type)).upper()
    if name not in METHODS:
        accepted = ", ".join(sorted(METHODS))
        raise AdapterError(f"PEFT method {name} is not accepted; accepted: {accepted}")
    return METHODS[name]


def check_parts(method: Method, parts: str) -> None:
    """Refuses a method on a part where it cannot work.

    Raises:
        AdapterError: Says why.
    """
    if parts not in PARTS:
        raise AdapterError(f"parts {parts!r} are not accepted; accepted: {', '.join(PARTS)}")
    if parts not in method.parts:
        raise AdapterError(f"{method.name} on {parts!r}: {method.why_not}")
