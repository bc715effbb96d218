"""What AdaLoRA's training has beside weights and an optimizer: where its ranks' allocation is.

``RankAllocator`` smooths a score of every weight over the steps, and a singular value that it
zeroed is alive again once the optimizer has moved it. What PEFT saves has neither: it lacks the
averages, and matrices are cut to the ranks that are kept. So a run that is to go on as if it had
never stopped takes these along. Entries are named ``KEY/NAME``, by the saved name of a parameter:
``ipt``, ``exp_avg_ipt``, ``exp_avg_unc`` (``RankAllocator``'s own names), ``kept`` (booleans [R] of
a ``lora_E``) and ``matrix`` (a parameter, uncut).

Dimension letters: R adapter rank.
"""

from __future__ import annotations

import torch
from peft import AdaLoraModel

from shared.errors import AdapterError

State = dict[str, torch.Tensor]

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

_ADAPTER = "default"


def allocator_state(tuner: AdaLoraModel) -> State:
    """Copies the averages, and which singular values the last allocation kept."""
    found = {
        f"{key}/{_saved(name)}": tensor.detach().cpu().clone()
        for key in AVERAGES
        for name, tensor in getattr(tuner.rankallocator, key).items()
    }
    for name, kept in (tuner.peft_config[_ADAPTER].rank_pattern or {}).items():
        found[f"kept/{_saved(name)}"] = torch.tensor(kept, dtype=torch.bool)
    return found


def matrices(tuner: AdaLoraModel) -> State:
    """Copies the adapter's parameters in their full ranks."""
    return {f"matrix/{n}": p.detach().cpu().clone() for n, p in _parameters(tuner).items()}


def check_allocator_state(tuner: AdaLoraModel, state: State) -> None:
    """Refuses a state that is not of this adapter.

    Raises:
        AdapterError: Names an entry that is foreign, missing, of another shape or not finite.
    """
    parameters = _parameters(tuner)
    for entry, tensor in state.items():
        key, _, name = entry.partition("/")
        shape = _shape(key, name, parameters)
        if shape is None or tuple(tensor.shape) != shape:
            raise AdapterError(
                f"AdaLoRA's state {entry} {tuple(tensor.shape)} is not accepted: "
                f"{'no such entry' if shape is None else f'its shape is {shape}'}"
            )
        if tensor.is_floating_point() == (key == "kept"):
            raise AdapterError(f"AdaLoRA's state {entry} is {tensor.dtype}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"AdaLoRA's state {entry} holds NaN or Inf")
    for key in (*AVERAGES, "matrix", "kept"):
        wanted = {n for n in parameters if key != "kept" or "lora_E" in n}
        given = _of(key, state).keys()
        if given and given != wanted:
            raise AdapterError(f"AdaLoRA's state lacks {key}/{min(wanted - given)}")
    if len({bool(_of(key, state)) for key in AVERAGES}) > 1:
        raise AdapterError(f"AdaLoRA's state has some of {', '.join(AVERAGES)} and not all")


def restore_allocator(tuner: AdaLoraModel, state: State) -> None:
    """Puts a state that :func:`check_allocator_state` accepts in the place of the present one."""
    allocator, parameters = tuner.rankallocator, _live(tuner)
    for key in AVERAGES:
        given = _of(key, state)
        averages = {n: given[_saved(n)].to(p) for n, p in parameters.items() if given}
        setattr(allocator, key, averages)
    kept = _of("kept", state)
    pattern = {n: kept[n].tolist() for n in map(_saved, parameters) if n in kept}
    tuner.peft_config[_ADAPTER].rank_pattern = pattern or None
    uncut = _of("matrix", state)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if uncut:
                parameter.copy_(uncut[_saved(name)])


def _of(key: str, state: State) -> State:
    prefix = f"{key}/"
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _shape(key: str, name: str, parameters: State) -> tuple[int, ...] | None:
    parameter = parameters.get(name)
    if parameter is None or key not in (*AVERAGES, "kept", "matrix"):
        return None
    if key == "kept":
        return (parameter.shape[0],) if "lora_E" in name else None
    return tuple(parameter.shape)


def _live(tuner: AdaLoraModel) -> State:
    """The parameters that the allocator scores, by its own names for them."""
    named = tuner.model.named_parameters()
    return {n: p for n, p in named if "lora_" in n and _ADAPTER in n}


def _parameters(tuner: AdaLoraModel) -> State:
    return {_saved(name): parameter for name, parameter in _live(tuner).items()}


def _saved(name: str) -> str:
    return name.replace(f".{_ADAPTER}", "")
