"""Blocks that keep their module tree, names and vectors, and whose matrices are remote tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from shared.models.families import Family
from shared.models.split_range import SplitRange
from shared.skeleton.remote_tensor import Fetch, Norms, RemoteTensor, remote_parameter

FetchOf = Callable[[str], tuple[Fetch, Norms]]
"""Of a parameter's name: what fetches it, and the norms of its rows and columns."""


class Hollow:
    """Mixed into a layer's own class: its matrix is elsewhere, whatever is done to the layer."""

    def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        order, remote = list(self._parameters), _take_remote(self)
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, tensor in remote.items():
            moved = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            made = tensor.like(moved.dtype, moved.device)
            self._parameters[name] = remote_parameter(made, tensor.requires_grad)
        self._parameters = {name: self._parameters[name] for name in order}
        return self

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name, parameter in self._parameters.items():
            if isinstance(parameter, RemoteTensor):
                del destination[prefix + name]

    def _load_from_state_dict(self: Any, state: Any, prefix: str, *args: Any) -> None:
        order, remote = list(self._parameters), _take_remote(self)
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[misc]
        found = self._parameters | remote
        self._parameters = {name: found[name] for name in order}

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        # One layer that is copied by itself (modules_to_save) is copied to be trained: its matrix
        # is fetched. Copied with its model, it stays hollow.
        if not memo:
            for parameter in self._parameters.values():
                if isinstance(parameter, RemoteTensor):
                    value = nn.Parameter(parameter.value(), parameter.requires_grad)
                    memo[id(parameter)] = value
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made as the program runs, so pickle is told how."""
        return _again, (type(self).__bases__[1],), self.__dict__

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuses: the trunk computes this layer.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a layer of the trunk's blocks was called at the client")


_classes: dict[type, type] = {}


def skeleton_blocks(
    config: PreTrainedConfig,
    family: Family,
    split: SplitRange,
    vectors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    fetch_of: FetchOf,
    linear: frozenset[str] = frozenset(),
) -> list[tuple[str, nn.Module]]:
    """Builds the trunk's blocks of a model without their matrices.

    Args:
        config: Of the whole model.
        family: Of the model.
        split: The trunk's blocks.
        vectors: Their norms' weights and biases, by full name; few, and real.
        dtype: What the trunk holds its weights in, or computes in where they are quantised.
        fetch_of: Makes what fetches a matrix.
        linear: Full names of modules that are ``nn.Linear`` on the trunk where the family's own is
            a ``Conv1D``, because they were quantised there.

    Returns:
        Global names and blocks, frozen.
    """
    with torch.device("meta"):
        base = family.base_class(config)
    blocks = list(getattr(base, family.layers))[split.start : split.end]
    named = [(str(split.start + i), block) for i, block in enumerate(blocks)]
    for name, block in named:
        prefix = f"{family.layer_prefix}{name}"
        _use_linear(block, prefix, linear)
        hollow(block, prefix, vectors, dtype, fetch_of)
    return named


def hollow(
    block: nn.Module,
    prefix: str,
    vectors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    fetch_of: FetchOf,
) -> None:
    """Puts remote tensors in the place of a block's matrices and values in that of its vectors.

    Args:
        block: On the meta device; changed in place.
        prefix: Its full name.
        vectors: Values by full name.
        dtype: Of all of them.
        fetch_of: Makes what fetches a matrix.
    """
    for path, layer in block.named_modules(prefix=prefix):
        for name, parameter in list(layer._parameters.items()):
            if parameter is None:
                continue
            full = f"{path}.{name}"
            if parameter.ndim < 2:
                value = vectors[full].detach().to(dtype, copy=True)
                layer._parameters[name] = nn.Parameter(value, requires_grad=False)
                continue
            remote = RemoteTensor(parameter.shape, dtype, torch.device("cpu"), *fetch_of(full))
            layer._parameters[name] = remote_parameter(remote)
            layer.__class__ = _hollow_class(type(layer))


def _use_linear(block: nn.Module, prefix: str, linear: frozenset[str]) -> None:
    for path, layer in list(block.named_modules()):
        if isinstance(layer, Conv1D) and f"{prefix}.{path}" in linear:
            parent, _, name = path.rpartition(".")
            made = nn.Linear(layer.nx, layer.nf, device="meta")
            setattr(block.get_submodule(parent), name, made)


def _take_remote(layer: nn.Module) -> dict[str, RemoteTensor]:
    parameters: dict[str, Any] = dict(layer._parameters)
    found = {n: p for n, p in parameters.items() if isinstance(p, RemoteTensor)}
    for name in found:
        del layer._parameters[name]
    return found


def _hollow_class(plain: type) -> type:
    if issubclass(plain, Hollow):
        return plain
    if plain not in _classes:
        # By the plain one's own name: libraries look at it.
        body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _classes[plain] = type(plain.__name__, (Hollow, plain), body)
    return _classes[plain]


def _again(plain: type) -> Any:
    return object.__new__(_hollow_class(plain))
