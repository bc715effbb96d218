"""An optimizer's state as named tensors, so that it can leave the trunk and come back.

A parameter's entry ``KEY`` travels as ``NAME/KEY``; a number as a tensor ``NAME/KEY:int`` or
``NAME/KEY:float``. What comes back is compared with what the optimizer itself would make.
"""

from __future__ import annotations

from typing import Any

import torch

from shared.errors import OptimizerError

State = dict[str, torch.Tensor]

_NUMBERS: dict[str, type[int] | type[float]] = {"int": int, "float": float}


def read_state(optimizer: torch.optim.Optimizer, names: list[str]) -> State:
    """Copies the state of an optimizer over parameters of these names, in their order."""
    found: State = {}
    for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"{name}/{key}"] = value.detach().cpu().clone()
            elif isinstance(value, int | float):
                kind = "int" if isinstance(value, int) else "float"
                found[f"{name}/{key}:{kind}"] = torch.tensor(value, dtype=torch.float64)
            elif value is not None:
                raise OptimizerError(f"{type(optimizer).__name__}: state {key} does not travel")
    return found


def write_state(optimizer: torch.optim.Optimizer, names: list[str], state: State) -> None:
    """Gives a fresh optimizer a state that :func:`read_state` copied.

    Raises:
        OptimizerError: If an entry is not one of this optimizer's, or has another shape; the
            optimizer is then as it was.
    """
    parameters = optimizer.param_groups[0]["params"]
    expected = _expected(optimizer, names, parameters)
    by_name: dict[str, dict[str, Any]] = {}
    for full_name, tensor in state.items():
        name, _, key = full_name.rpartition("/")
        shape = expected.get(full_name)
        if shape is None or tuple(tensor.shape) != shape:
            raise OptimizerError(
                f"optimizer state {full_name} {tuple(tensor.shape)} is not accepted: "
                f"{'no such entry' if shape is None else f'its shape is {shape}'}"
            )
        _check_values(full_name, key, tensor)
        plain, _, number = key.partition(":")
        by_name.setdefault(name, {})[plain] = _NUMBERS[number](tensor) if number else tensor
    if missing := expected.keys() - state.keys():
        # A parameter without a gradient so far has no state; half a state is a mistake.
        half = sorted(n for n in missing if n.rpartition("/")[0] in by_name)
        if half:
            raise OptimizerError(f"optimizer state lacks {half[0]}")
    indexed = {i: by_name[name] for i, name in enumerate(names) if name in by_name}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": indexed, "param_groups": groups})


def _check_values(full_name: str, key: str, tensor: torch.Tensor) -> None:
    """Refuses counts of steps that no training arrives at: optimizers divide by them.

    Moments may be infinite: a training whose gradients overflowed once has such.
    """
    if key.partition(":")[0] == "step":
        count = float(tensor)
        if not 0 <= count < float("inf") or count != int(count):
            raise OptimizerError(f"optimizer state {full_name} is {count}: not a number of steps")


def _expected(
    optimizer: torch.optim.Optimizer, names: list[str], parameters: list[torch.nn.Parameter]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state, from a step of the same optimizer on copies."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    trial = type(optimizer)(copies, **_constructor(settings))
    trial.param_groups[0].update(settings)
    trial.step()
    return {name: tuple(t.shape) for name, t in read_state(trial, names).items()}


def _constructor(settings: dict[str, Any]) -> dict[str, Any]:
    # The rest is set on the group afterwards: not every group entry is an argument.
    wanted = ("lr", "relative_step", "momentum", "amsgrad", "centered", "beta1")
    return {k: settings[k] for k in wanted if k in settings}
