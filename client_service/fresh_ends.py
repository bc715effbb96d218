"""Draws a fresh adapter's parameters at the ends anew, from randomness that no seed repeats.

Torch keeps 32 bits of a seed, and the trunk is sent its half of a fresh adapter: who tries seeds
finds the one that gives that half, and with it the ends' half.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, PeftType
from torch import nn

from shared.errors import InvalidInputError

# Of the state of torch's generator on a CPU: seed, left, seeded, next; then the words of the
# Mersenne twister, 32 bits in 64 each.
_BEFORE_WORDS, _WORDS = 24, 624
_DRAWN = frozenset({True, False, None, "gaussian", "orthogonal", "lycoris", "bat", "mini"})
"""What fields named ``init…weights`` may say: the others compute with the base weights."""


def redraw_ends(model: PeftModel, adapter_name: str | None = None) -> None:
    """Replaces what a fresh adapter of a split model drew outside the trunk's blocks.

    The distribution is PEFT's for this configuration; what the trunk's blocks have stays, and so
    does torch's generator. This protects the bits of the ends' fresh parameters from a host that
    searches seeds. It does not protect the text: hidden states and gradients are sent as before.

    Args:
        model: A PEFT model around a split model, its adapter not yet trained.
        adapter_name: Which; None takes the active one.

    Raises:
        InvalidInputError: If it is no such model or adapter, or the adapter is not fresh.
    """
    passage = getattr(getattr(model, "get_base_model", lambda: None)(), "passage", None)
    if passage is None:
        raise InvalidInputError(
            f"redraw_ends of a {type(model).__name__}: accepted is a PEFT model around a split one"
        )
    name = model.active_adapter if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise InvalidInputError(
            f"redraw_ends of adapter {name!r}: accepted are {', '.join(model.peft_config)}"
        )
    config = model.peft_config[name]
    _check(config)
    inside = {id(p) for _, block in passage.blocks() for p in block.parameters()}
    mine = {n: p for n, p in _of(model, name).items() if id(p) not in inside}
    with _second(model, name, config) as second:
        drawn = {n: second[n] for n in mine if n in second}
        for path, fresh in drawn.items():
            if _is_constant(fresh) and not torch.equal(mine[path], fresh):
                raise InvalidInputError(
                    f"redraw_ends of adapter {name!r}: {path} is no longer what PEFT begins with; "
                    f"accepted is an adapter that was not trained or loaded"
                )
        with torch.no_grad():
            for path, fresh in drawn.items():
                mine[path].copy_(fresh)


def can_redraw(config: PeftConfig) -> bool:
    """Whether :func:`redraw_ends` takes a fresh adapter of this configuration."""
    try:
        _check(config)
    except InvalidInputError:
        return False
    return True


def _check(config: PeftConfig) -> None:
    if config.peft_type == PeftType.PREFIX_TUNING:
        raise InvalidInputError(
            "redraw_ends of prefix tuning: its keys and values are one draw, of which the trunk is "
            "sent a part; accepted are adapters of layers, and prompts"
        )
    for field, value in vars(config).items():
        if field.startswith("init") and field.endswith("weights") and value not in _DRAWN:
            raise InvalidInputError(
                f"redraw_ends with {field}={value!r}: that is computed of the base weights, not "
                f"drawn; accepted are True and the words of a random draw"
            )


@contextmanager
def _second(
    model: PeftModel, name: str, config: PeftConfig
) -> Iterator[Mapping[str, nn.Parameter]]:
    """Another adapter of the same configuration, for as long; by the first one's names."""
    other = _unused(model)
    again = copy.deepcopy(config)
    # PEFT has several adapters if one of them is trained, and one of them has biases.
    again.inference_mode = True
    if isinstance(getattr(again, "bias", None), str):
        again.bias = "none"  # type: ignore[attr-defined]
    asked = {p: p.requires_grad for p in model.parameters()}
    try:
        with _system_randomness():
            model.add_adapter(other, again)
        yield {n.replace(f".{other}", f".{name}"): p for n, p in _of(model, other).items()}
    finally:
        if other in model.peft_config:
            model.delete_adapter(other)
        for parameter, requires_grad in asked.items():
            parameter.requires_grad_(requires_grad)


def _of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in f"{n}."}


def _unused(model: PeftModel) -> str:
    while (name := f"redrawn_{secrets.token_hex(8)}") in model.peft_config:
        pass
    return name


def _is_constant(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.flatten()[:1]).all())


@contextmanager
def _system_randomness() -> Iterator[None]:
    """Torch's generators begin at states that the system drew; afterwards they are as before."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(secrets.token_bytes(8), "little", signed=True))
        state = torch.get_rng_state()
        words = state[_BEFORE_WORDS : _BEFORE_WORDS + 8 * _WORDS].view(torch.int64)
        drawn = bytearray(secrets.token_bytes(4 * _WORDS))
        words.copy_(torch.frombuffer(drawn, dtype=torch.int32).long() & 0xFFFFFFFF)
        torch.set_rng_state(state)
        yield
