"""Notices what ordinary code changed in the trunk's blocks that the trunk would not hear of.

Adapters, vectors, dropout and switches travel. A layer of another class, an attribute that a layer
computes with, a method that somebody replaced: these would change the client's own blocks and not
the trunk's, so they are refused by name.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import isfunction
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shared.adapters.structure import base_name
from shared.errors import AdapterError

Named = Sequence[tuple[str, nn.Module]]
"""Modules by full name."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch.", "transformers.", "peft.", "bitsandbytes.")
_OURS = ("client_service.", "shared.")
_STANDARD = sys.stdlib_module_names
_TRAVELS = frozenset({"p", "inplace", "attention_dropout", "training"})
"""Attributes of dropout layers and attention that the trunk is told."""
_MOVES = frozenset({"max_seq_len_cached", "gradient_checkpointing"})
"""Attributes that a forward changes by itself, or that mean nothing in these blocks."""
_PLAIN = (bool, int, float, str, type(None), tuple)
_CONFIG = ("sliding_window", "layer_types", "attention_chunk_size", "is_causal")
"""Fields of the model's configuration that masks are made of at every call."""


@dataclass(frozen=True)
class _Layer:
    """A layer of the family's own: its class by name, and its plain attributes."""

    made_as: tuple[str, str]
    attributes: Mapping[str, Any]


class UnchangedBlocks:
    """The trunk's blocks as they were made.

    Args:
        blocks: By full name, before anybody had them.
        inputs: What else the trunk makes itself, such as the rotary embedding.
        config: Of the whole model.
    """

    def __init__(self, blocks: Named, inputs: Named, config: Any) -> None:
        self._layers = {path: _layer(module) for path, module in _walk([*blocks, *inputs])}
        self._config = _masks_of(config)
        self._modules = [module for _, module in _walk([*blocks, *inputs])]

    def check(self, blocks: Named, inputs: Named, config: Any) -> None:
        """Compares them with what they are now.

        Args:
            blocks: As they are, with PEFT's layers around some of the family's.
            inputs: As they are.
            config: As it is.

        Raises:
            AdapterError: Names a layer and what was changed.
        """
        whole = {id(block) for _, block in blocks}
        now = _masks_of(config)
        if changed := [name for name, value in self._config.items() if now[name] != value]:
            name = changed[0]
            raise AdapterError(
                f"config.{name} was changed to {now[name]!r} after the model was opened, which the "
                f"trunk's blocks do not hear of: accepted is the model's own {self._config[name]!r}"
            )
        missing = dict(self._layers)
        within_peft = "\0"
        sources: dict[type, str] = {}
        self._modules = []
        for path, module in _walk([*blocks, *inputs]):
            self._modules.append(module)
            made = type(module)
            if made not in sources:
                sources[made] = _foreign_forward(made)
            if sources[made]:
                _refuse_call(path, f"the forward of {sources[made]}")
            if id(module) not in whole and has_hooks(module):
                _refuse_call(path, _what(module))
            if issubclass(made, BaseTunerLayer | AuxiliaryTrainingWrapper):
                if not path.startswith(within_peft):
                    within_peft = f"{path}."
                continue
            known = missing.pop(base_name(f"{path}.").rstrip("."), None)
            if known is not None:
                _check_layer(path, known, module)
            elif not path.startswith(within_peft):
                raise AdapterError(
                    f"{path} was added to the trunk's blocks, which the trunk would not compute: "
                    f"accepted are PEFT's adapters"
                )
        if missing:
            raise AdapterError(
                f"{min(missing)} was taken out of the trunk's blocks, which would be computed all "
                f"the same: accepted are the family's own blocks"
            )
        _check_no_global_hooks()
        _check_functions({type(block) for _, block in blocks}, config)

    def seen(self, blocks: Named, inputs: Named, config: Any) -> tuple[object, ...]:
        """What is another one if a layer, a hook or a forward was put in place since a check.

        At a small part of a check's cost, for between two tokens; attributes are not looked at.
        """
        own = [module.__dict__ for module in self._modules]
        return (
            RemovableHandle.next_id,
            tuple(_masks_of(config).values()),
            ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation),
            tuple(map(len, own)),
            tuple(id(child) for attributes in own for child in attributes["_modules"].values()),
            tuple(_forward_of(made) for made in {type(block) for _, block in [*blocks, *inputs]}),
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody put a hook on a module, or a forward in the place of its own."""
    own = module.__dict__
    if "forward" in own:
        return True
    return any(own[kind] and not all(map(_is_known, own[kind].values())) for kind in _HOOKS)


def _walk(blocks: Named) -> Iterator[tuple[str, nn.Module]]:
    for prefix, block in blocks:
        yield from block.named_modules(prefix=prefix, remove_duplicate=False)


def _masks_of(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in _CONFIG}
    return {n: tuple(value) if isinstance(value, list) else value for n, value in found.items()}


def _layer(module: nn.Module) -> _Layer:
    made = type(module)
    attributes = {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, _PLAIN) and not name.startswith("_") and name not in _TRAVELS | _MOVES
    }
    return _Layer((made.__module__, made.__qualname__), attributes)


def _check_layer(path: str, known: _Layer, module: nn.Module) -> None:
    made = type(module)
    if known.made_as != (made.__module__, made.__qualname__):
        raise AdapterError(
            f"{path} was replaced by a {made.__module__}.{made.__qualname__}, which would never "
            f"run: the trunk computes this layer; accepted is {'.'.join(known.made_as)}"
        )
    own = module.__dict__
    for name, value in known.attributes.items():
        found = own.get(name, value)
        if found is not value and found != value:
            raise AdapterError(
                f"{path}.{name} was set to {found!r}, which the trunk does not hear of: accepted "
                f"is {value!r}, as the model was opened with"
            )


def _foreign_forward(made: type) -> str:
    """Whose a class's forward is, if no library's that the trunk has too."""
    forward = _forward_of(made)
    source = _source(forward)
    return "" if source.startswith(_LIBRARIES) else f"{source}{forward.__qualname__}"


def _what(module: nn.Module) -> str:
    return "a forward of its own" if "forward" in module.__dict__ else "a hook"


def _refuse_call(path: str, what: str) -> NoReturn:
    """Refuses what would be done in a layer's call, since this one is called at the trunk."""
    raise AdapterError(
        f"{path} was given {what}, which would never run: the trunk computes this layer; accepted "
        f"are hooks on whole blocks and on the client's own layers"
    )


def _check_no_global_hooks() -> None:
    """Refuses torch's hooks on every module: those inside the trunk's blocks are not called."""
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        hooks = getattr(torch_module, f"_global_{kind}_hooks")
        if any(not _is_known(hook) for hook in hooks.values()):
            raise AdapterError(
                f"a global {kind} hook would not be called for the layers that the trunk computes: "
                f"accepted are hooks on the client's own layers and on whole blocks"
            )


def _check_functions(blocks: set[type], config: Any) -> None:
    """Refuses functions that blocks call and somebody has replaced in their module."""
    names = {c.__module__ for made in blocks for c in made.__mro__}
    modules = [sys.modules[name] for name in names if name.startswith("transformers.models.")]
    functions = {f"{m.__name__}.{n}": f for m in modules for n, f in vars(m).items()}
    functions = {name: f for name, f in functions.items() if isfunction(f)}
    word = config._attn_implementation
    if (attention := ALL_ATTENTION_FUNCTIONS.get(word)) is not None:
        functions[f"the attention {word!r}"] = attention
    for name, function in functions.items():
        source = _source(function)
        if not source.startswith(_LIBRARIES) and source.split(".")[0] not in _STANDARD:
            raise AdapterError(
                f"{name} was replaced by {source}{function.__qualname__}, which the trunk does not "
                f"have: accepted is transformers' own"
            )


def _forward_of(made: type) -> Any:
    """The forward that a class has without the classes that are mixed in here."""
    found = (c.__dict__["forward"] for c in made.__mro__ if "forward" in c.__dict__)
    return next(f for f in found if not _source(f).startswith(_OURS))


def _source(function: Any) -> str:
    """The module that a function was written in, with a dot; ``__module__`` may be another's."""
    return f"{getattr(function, '__globals__', {}).get('__name__')}."


def _is_known(hook: Any) -> bool:
    function = hook.func if isinstance(hook, functools.partial) else hook
    return _source(function).startswith(("peft.", "transformers."))
