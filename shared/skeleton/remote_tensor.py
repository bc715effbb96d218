"""A matrix of the trunk's blocks as the client has it: shape, dtype and device, no numbers.

Libraries that ask a base weight for its shape or move it find what they expect. What computes with
the numbers (a copy for ``modules_to_save``) has them fetched, if the host allows it; the norm of
each row alone (DoRA's fresh magnitudes) is asked for as such. What would write into them is
refused, because the trunk's weights are shared by its tenants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from shared.errors import SharedWeightsError

aten = torch.ops.aten

_TOWARDS = (aten.copy_.default, aten.lerp_.Scalar, aten.lerp_.Tensor)
_ALL_TOWARDS = (aten._foreach_copy_.default, aten._foreach_lerp_.Scalar)

Fetch = Callable[[], torch.Tensor]
"""Gives a matrix's numbers, or raises why it does not. Pickled with the model, if that is.

Those of one matrix are equal, whichever model they are of."""

Norms = tuple[Fetch | None, Fetch | None]
"""What gives the 2-norm of each row, and of each column, in float32; None if nothing does."""


class RemoteTensor(torch.Tensor):
    """A tensor of which only the description is here; see the module.

    Args:
        shape: Of the matrix.
        dtype: Of the matrix.
        device: Where the client computes; fetched numbers are put there.
        fetch: Gives the numbers.
        norms: Of its rows and columns.
    """

    fetch: Fetch
    norms: Norms
    _is_hf_initialized = True  # transformers' initialisation passes it by

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        fetch: Fetch,
        norms: Norms = (None, None),
    ) -> RemoteTensor:
        """Makes a tensor without storage."""
        made: RemoteTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device
        )
        return made

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        fetch: Fetch,
        norms: Norms = (None, None),
    ) -> None:
        self.fetch, self.norms = fetch, norms

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Describes views and moves anew; fetches for whatever else reads.

        Raises:
            SharedWeightsError: If it would be written.
        """
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return args[0].like()
        if func is aten._to_copy.default:
            return args[0].like(kwargs.get("dtype"), kwargs.get("device"))
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = given.get(argument.name)
            several = written if isinstance(written, list | tuple) else [written]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and any(isinstance(tensor, cls) for tensor in several):
                return _written(func, args, kwargs)
        if any(result.alias_info is not None for result in func._schema.returns):
            return _views(func, args, kwargs)  # or a write into a view would go nowhere
        if func is aten.add.Tensor and _adds_nothing(*args, **kwargs):
            return args[0].like(torch.promote_types(args[0].dtype, args[1].dtype))
        if func is aten.sub.Tensor and not kwargs and _is_same(*args):
            return torch.zeros(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        if func is aten.linalg_vector_norm.default and _is_of_rows(*args, **kwargs):
            return args[0].norms[0]().to(args[0].device)
        return _computed(func, args, kwargs)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """Another description of the same matrix."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        # Not an operation that is dispatched; PiSSA, OLoRA and LoftQ put a residual here.
        raise _refusal("an assignment to .data")

    def value(self) -> torch.Tensor:
        """Fetches the numbers, as an ordinary tensor.

        Raises:
            TrunklineError: If the trunk does not give them.
        """
        return self.fetch().to(self.device, self.dtype)

    def like(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> RemoteTensor:
        """Describes the same matrix, in another dtype or elsewhere."""
        dtype = dtype or self.dtype
        # Norms of rounded numbers would be others.
        norms = self.norms if torch.promote_types(self.dtype, dtype) == dtype else (None, None)
        return RemoteTensor(self.shape, dtype, device or self.device, self.fetch, norms)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = _of_kind(self, self.like())
        # Of the copied model's own session.
        made.fetch, made.norms = copy.deepcopy((self.fetch, self.norms), memo)
        return memo.setdefault(id(self), made)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        as_parameter = isinstance(self, nn.Parameter)
        given = (self.shape, self.dtype, self.device, self.fetch, self.norms)
        return _again, (*given, as_parameter, self.requires_grad)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RemoteTensor({tuple(self.shape)}, {self.dtype})"


@dataclass(frozen=True)
class _Result:
    """Fetches a matrix and computes with it, or looks at a part of it."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None
    """Which of several results."""

    def __call__(self) -> torch.Tensor:
        found = _computed(self.func, self.args, self.kwargs)
        return found if self.index is None else found[self.index]  # type: ignore[no-any-return]


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(RemoteTensor, RemoteTensor.value, (args, kwargs))
    return func(*args, **kwargs)


def _views(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    of = next(a for a in args if isinstance(a, RemoteTensor))
    described = tree_map_only(RemoteTensor, _on_meta, (args, kwargs))
    found = func(*described[0], **described[1])
    transposes = func is aten.t.default or (
        func is aten.permute.default and [dim % of.ndim for dim in args[1]] == [1, 0]
    )
    norms = of.norms[::-1] if transposes else (None, None)

    def view(like: torch.Tensor, index: int | None = None) -> RemoteTensor:
        result = _Result(func, args, kwargs, index)
        return RemoteTensor(like.shape, like.dtype, of.device, result, norms)

    if isinstance(found, torch.Tensor):
        return view(found)
    return type(found)(view(like, index) for index, like in enumerate(found))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lets a matrix be replaced by, or moved towards, the very same one, as averages do.

    Raises:
        SharedWeightsError: If it would become another.
    """
    if func in _TOWARDS and _is_same(args[0], args[1]):
        return args[0]
    if func not in _ALL_TOWARDS:
        raise _refusal(str(func))
    pairs = list(zip(args[0], args[1], strict=True))
    others = [pair for pair in pairs if not _is_same(*pair)]
    if any(isinstance(tensor, RemoteTensor) for tensor, _ in others):
        raise _refusal(str(func))
    if others:
        func(*map(list, zip(*others, strict=True)), *args[2:], **kwargs)
    return None


def _is_same(tensor: Any, other: Any) -> bool:
    if not (isinstance(tensor, RemoteTensor) and isinstance(other, RemoteTensor)):
        return False
    alike = tensor.shape == other.shape and tensor.dtype == other.dtype
    return alike and tensor.fetch == other.fetch


def _adds_nothing(tensor: Any, other: Any, alpha: float = 1) -> bool:
    same = isinstance(tensor, RemoteTensor) and isinstance(other, torch.Tensor)
    if not same or isinstance(other, RemoteTensor) or other.shape != tensor.shape:
        return False
    return not bool(other.any())


def _is_of_rows(
    tensor: Any, order: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> bool:
    plain = order == 2 and list(dim or ()) == [1] and not keepdim and dtype is None
    described = isinstance(tensor, RemoteTensor) and tensor.norms[0] is not None
    return plain and described and tensor.dtype == torch.float32


def _on_meta(tensor: RemoteTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def remote_parameter(tensor: RemoteTensor, requires_grad: bool = False) -> nn.Parameter:
    """A parameter that is a remote tensor."""
    return nn.Parameter(tensor, requires_grad=requires_grad)


def _of_kind(old: torch.Tensor, new: RemoteTensor) -> Any:
    return remote_parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _again(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    fetch: Fetch,
    norms: Norms,
    as_parameter: bool,
    requires_grad: bool,
) -> torch.Tensor:
    made = RemoteTensor(shape, dtype, device, fetch, norms)
    return remote_parameter(made, requires_grad) if as_parameter else made


def _refusal(what: str) -> SharedWeightsError:
    return SharedWeightsError(
        f"{what} would write into a base matrix of the trunk's blocks, which its tenants share: "
        "accepted are adapters whose own tensors hold what is trained"
    )
