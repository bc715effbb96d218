"""A tenant's module tree: the trunk's blocks around shared tensors, its adapters' values in them.

The tree holds nothing that a client does not have as well. It is made anew from what the client
says of its adapters, and every tensor in it that is not shared is one that the client sent.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from shared.adapters.structure import (
    AdapterSpec,
    LayerState,
    Structure,
    Value,
    base_name,
    dropout_of,
    outside,
    scaling_of,
    set_dropout_of,
)
from shared.errors import AdapterError
from shared.models.quantization import shared_tensors
from trunk_service.adapter_build import TreeLimits, add_adapters, check_specs, discard

_SHORT = 3  # names in a message
_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Leaf:
    """A tensor of the client's, in the tree."""

    value: Value
    tensor: torch.Tensor
    version: int = 0
    """Torch's count of writes into it, when it was made."""


@dataclass(frozen=True)
class TreeState:
    """What a tree is at one moment; a forward that is run again needs that of its first time."""

    built: _Built
    leaves: dict[str, Leaf]
    layers: tuple[LayerState, ...]


@dataclass(frozen=True)
class _Built:
    """A module tree as PEFT made it."""

    adapters: tuple[AdapterSpec, ...]
    model: Any
    tuner: Any
    base: dict[str, torch.Tensor]
    """Shared tensors by name."""
    added: dict[str, tuple[torch.Size, bool]]
    """Shape of each tensor of the adapters, and whether it is a buffer."""
    places: dict[str, tuple[dict[str, Any], str]]
    """Where each tensor stands: among a module's parameters or buffers, under its last name."""
    stated: dict[str, Any]
    """Layers whose state the client tells."""


class TenantTree:
    """The trunk's blocks with one tenant's adapters.

    Args:
        part: The shared blocks; never changed.
        limits: What the tree may hold.
    """

    def __init__(self, part: Any, limits: TreeLimits | None = None) -> None:
        self._part, self._limits = part, limits or TreeLimits()
        prefix = part.family.layer_prefix
        self._own = {n: m for n, m in part.named_modules() if n.startswith(prefix)}
        self._now: TreeState | None = None

    @property
    def _state(self) -> TreeState:
        """What the tree is now; the bare blocks before anything was put there."""
        if self._now is None:
            self._now = TreeState(self._build(()), {}, ())
        return self._now

    @property
    def model(self) -> Any:
        """What to call: a part, with whatever PEFT put into it."""
        return self._state.built.model

    @property
    def state(self) -> TreeState:
        """What the tree is now."""
        return self._state

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """The client's tensors by their first names."""
        return {name: leaf.tensor for name, leaf in self._state.leaves.items()}

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Those that require a gradient."""
        return [leaf.tensor for leaf in self._state.leaves.values() if leaf.tensor.requires_grad]

    @property
    def nbytes(self) -> int:
        """Bytes of the client's tensors."""
        return sum(leaf.tensor.nbytes for leaf in self._state.leaves.values())

    def train(self, mode: bool) -> None:
        """Sets the mode of all modules."""
        (self._state.built.tuner or self.model).train(mode)

    def check_unwritten(self) -> None:
        """Refuses a method whose forward writes into its own tensors; ask after the first one.

        What it wrote would stay here, and the client's own would be other than the whole model's.

        Raises:
            AdapterError: Names the tensors.
        """
        leaves = self._state.leaves.items()
        if names := [n for n, leaf in leaves if leaf.tensor._version != leaf.version]:
            raise AdapterError(
                f"an adapter whose forward writes into its own tensors ({names[0]}) is not "
                f"accepted on the trunk's blocks: accepted are those that only read them there"
            )

    @contextlib.contextmanager
    def mixed(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Lets each row of a batch have an adapter of its own, while it lasts.

        Args:
            adapter_names: One a row; empty for the active ones.

        Raises:
            AdapterError: If there is no such adapter, or the method cannot do it.
        """
        if not adapter_names:
            yield
            return
        known = {spec.name for spec in self._state.built.adapters} | {"__base__"}
        hooks = getattr(self._state.built.tuner, "_enable_peft_forward_hooks", None)
        if hooks is None or set(adapter_names) - known:
            raise AdapterError(
                f"adapter_names={sorted(set(adapter_names))[:_SHORT]} are not accepted: accepted "
                f"are {sorted(known) if hooks else 'none with this method'}"
            )
        try:
            context = hooks(adapter_names=list(adapter_names))
            context.__enter__()
        except ValueError as error:
            raise AdapterError(f"adapter_names are not accepted: {error}") from error
        try:
            yield
        except TypeError as error:  # of a layer that passes on what it does not know (AdaLoRA's)
            if "adapter_names" not in str(error):
                raise
            raise AdapterError("adapter_names are not accepted with this method") from error
        finally:
            context.__exit__(None, None, None)

    def update(
        self,
        structure: Structure | None,
        values: Sequence[Value],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """Makes the tree what the client's is; all of it, or nothing.

        Every tensor becomes a leaf of its own, so that a graph that is held keeps the numbers that
        it was computed with.

        Args:
            structure: The adapters and their layers' states; None if they are as before.
            values: What is said of each tensor that comes.
            tensors: Their numbers.

        Raises:
            AdapterError: If an adapter is refused, or the two sides' trees differ; names what does.
        """
        is_told = structure is not None
        if structure is None:
            structure = Structure(self._state.built.adapters, self._state.layers)
        # Bare blocks that nobody asked for are not made, only to be dropped.
        before = self._now
        fresh = before is None or structure.adapters != before.built.adapters
        built = self._build(structure.adapters) if before is None or fresh else before.built
        old = {} if before is None else before.leaves
        try:
            leaves = _renewed(built, old, _new_leaves(built, values, tensors))
            if is_told:
                _check_same(built, structure.layers)
        except AdapterError:
            if fresh:
                discard(built.model)
            raise
        self.restore(TreeState(built, leaves, structure.layers))

    def restore(self, state: TreeState) -> None:
        """Makes the tree what it was.

        Args:
            state: Of this tree, at any time.
        """
        built, now = state.built, _by_name(state)
        same = self._now is not None and built is self._now.built
        before = _by_name(self._state) if same else {}
        for name in before.keys() - now.keys():
            _place(built, name, built.base[name])
        for name, tensor in now.items():
            if before.get(name) is not tensor:
                _place(built, name, tensor)
        for layer in state.layers:
            _set_state(built.stated[layer.module], layer)
        self._now = state

    def _build(self, specs: tuple[AdapterSpec, ...]) -> _Built:
        configs = check_specs(specs, self._own, self._limits)
        memo: dict[int, Any] = {id(t): _alias(t) for t in shared_tensors(self._part)}
        shared = {id(alias) for alias in memo.values()}
        model = copy.deepcopy(self._part, memo)
        tuner = add_adapters(model, specs, configs, self._limits)
        return _described(specs, model, tuner, shared, self._limits)


def _alias(tensor: Any) -> Any:
    """A parameter of the tenant's own over the shared numbers, whose flags PEFT may set."""
    if type(tensor) is nn.Parameter and tensor.is_floating_point():
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor


def _described(
    specs: tuple[AdapterSpec, ...], model: Any, tuner: Any, shared: set[int], limits: TreeLimits
) -> _Built:
    modules = dict(model.named_modules(remove_duplicate=False))
    base, added, numbers, places = {}, {}, {}, {}
    for path, module in modules.items():
        for is_buffer, kind in ((False, module._parameters), (True, module._buffers)):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                full = base_name(f"{path}.{name}" if path else name)
                places[full] = (kind, name)
                if id(tensor) in shared:
                    base[full] = tensor
                    if type(tensor) is nn.Parameter:
                        tensor.requires_grad_(False)
                else:
                    added[full] = (tensor.shape, is_buffer)
                    numbers[id(tensor)] = tensor.numel()
    if sum(numbers.values()) > limits.max_parameters:
        discard(model)
        raise AdapterError(
            f"adapter of {sum(numbers.values())} parameters; this trunk accepts up to "
            f"{limits.max_parameters}"
        )
    stated = {path: module for path, module in modules.items() if _is_stated(module)}
    return _Built(specs, model, tuner, base, added, places, stated)


def _is_stated(module: nn.Module) -> bool:
    adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    return adapted or dropout_of(module) is not None


def _fits(built: _Built, leaf: Leaf) -> bool:
    """Whether every name of a leaf is a place for it."""
    return not any(_misplaced(built, name, leaf.value, leaf.tensor) for name in leaf.value.names)


def _misplaced(built: _Built, name: str, value: Value, tensor: torch.Tensor) -> str:
    """Why a tensor cannot stand somewhere; empty if it can."""
    if name in built.added:
        shape, is_buffer = built.added[name]
    elif name in built.base:
        shape, is_buffer = built.base[name].shape, not isinstance(built.base[name], nn.Parameter)
        if len(shape) > 1:
            return f"{name} is a base matrix of the trunk's blocks, which its tenants share"
    else:
        return f"the trunk has no {name[:120]}"
    if shape != tensor.shape:
        return f"{name} is {tuple(shape)} on the trunk, {tuple(tensor.shape)} at the client"
    if is_buffer != value.is_buffer:
        return f"{name} is a {'buffer' if is_buffer else 'parameter'} on the trunk alone"
    return ""


def _new_leaves(
    built: _Built, values: Sequence[Value], tensors: Sequence[torch.Tensor]
) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for value, tensor in zip(values, tensors, strict=True):
        reasons = [_misplaced(built, name, value, tensor) for name in value.names]
        if not value.names or any(reasons):
            _refuse([reason for reason in reasons if reason] or ["a tensor without a name"])
    device = next(iter(built.base.values())).device
    for value, tensor in zip(values, tensors, strict=True):
        if device.type != "cpu" and tensor.dtype in _INDICES:
            raise AdapterError(
                f"{value.names[0]} holds whole numbers, which PEFT may take for indices: accepted "
                f"on {device} are none, because one out of range would end the trunk"
            )
        leaf = tensor.detach().to(device, copy=True)
        wanted = value.requires_grad and (leaf.is_floating_point() or leaf.is_complex())
        leaf = leaf.requires_grad_(wanted) if value.is_buffer else nn.Parameter(leaf, wanted)
        found[value.names[0]] = Leaf(value, leaf, leaf._version)
    return found


def _renewed(built: _Built, old: Mapping[str, Leaf], new: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Leaves after an update; those that have lost their place, or are as the trunk's, are left.

    Raises:
        AdapterError: If a tensor of the adapters has no value.
    """
    pushed = {name for leaf in new.values() for name in leaf.value.names}
    found = {
        first: leaf
        for first, leaf in old.items()
        if pushed.isdisjoint(leaf.value.names) and _fits(built, leaf)
    }
    found |= {first: leaf for first, leaf in new.items() if not _is_base(built, leaf)}
    valued = {name for leaf in found.values() for name in leaf.value.names}
    if missing := sorted(built.added.keys() - valued):
        _refuse([f"the client has no value for {name}" for name in missing])
    return found


def _is_base(built: _Built, leaf: Leaf) -> bool:
    """Whether the trunk's own tensors do as well as a leaf."""
    own = [built.base.get(name) for name in leaf.value.names]
    return not leaf.tensor.requires_grad and all(
        t is not None and t.dtype == leaf.tensor.dtype and torch.equal(t, leaf.tensor) for t in own
    )


def _check_same(built: _Built, layers: Sequence[LayerState]) -> None:
    """Compares the client's layers with ours, both ways."""
    told = {layer.module: layer for layer in layers}
    if len(told) < len(layers):
        _refuse(["the client states a layer twice"])
    if absent := sorted(built.stated.keys() - told.keys()):
        _refuse([f"the client has no such layer as {name}" for name in absent])
    if absent := sorted(told.keys() - built.stated.keys()):
        _refuse([f"the trunk has no such layer as {name[:120]}" for name in absent])
    names = frozenset(spec.name for spec in built.adapters)
    shared = {t.untyped_storage().data_ptr() for t in built.base.values()}
    for path, layer in told.items():
        _check_layer(built.stated[path], layer, names, shared)


def _check_layer(module: Any, layer: LayerState, names: frozenset[str], shared: set[int]) -> None:
    adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    if not adapted:
        if layer.dropout is None or not 0 <= layer.dropout <= 1:
            raise AdapterError(
                f"dropout {layer.dropout} of {layer.module} is not accepted: from 0 to 1 is"
            )
        return
    if foreign := sorted(set(layer.active) - names):
        _refuse([f"{layer.module} has no adapter {name[:80]} on the trunk" for name in foreign])
    if layer.scaling.keys() != scaling_of(module).keys():
        _refuse([f"{layer.module} scales other adapters than on the trunk"])
    if isinstance(module, BaseTunerLayer):
        ours = outside(module, names, lambda t: t.untyped_storage().data_ptr() in shared)
        differing = sorted(
            name
            for name in ours.keys() | layer.outside.keys()
            if ours.get(name) != layer.outside.get(name)
        )
        if differing:
            what = "keeps other values outside its parameters than the trunk's"
            _refuse([f"{layer.module} {what}: {name[:80]}" for name in differing])


def _refuse(reasons: Sequence[str]) -> None:
    more = f" and {len(reasons) - _SHORT} more" if len(reasons) > _SHORT else ""
    raise AdapterError(f"the adapter's trees differ: {'; '.join(reasons[:_SHORT])}{more}")


def _by_name(state: TreeState) -> dict[str, torch.Tensor]:
    return {name: leaf.tensor for leaf in state.leaves.values() for name in leaf.value.names}


def _place(built: _Built, name: str, tensor: torch.Tensor) -> None:
    kind, attribute = built.places[name]
    kind[attribute] = tensor


def _set_state(module: Any, layer: LayerState) -> None:
    if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        set_dropout_of(module, layer.dropout or 0.0)
        return
    module._active_adapter = list(layer.active)
    module._disable_adapters = layer.disabled
    if isinstance(module, BaseTunerLayer) and layer.scaling:
        module.scaling.update(layer.scaling)
