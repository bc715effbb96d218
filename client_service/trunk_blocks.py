"""The trunk's blocks in the client's model: the family's own classes, computed by the trunk.

The first of them carries hidden states through all; the others hand on what it got. Where somebody
looks between them, with a hook or for every block's hidden states, each carries its own.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import _active_collector

from client_service.adapter_structure import (
    adapter_structure,
    adapter_tensors,
    check_shared,
    mixed_adapter_names,
)
from client_service.adapter_watch import AdapterWatch, Switches, check_same
from client_service.calls import ForwardCall
from client_service.dropout_key import dropout_key, user_secret
from client_service.remote_cache import RemoteCacheLayer, past_of, put_remote_layers
from client_service.trunk_function import Adapters, TrunkFunction
from client_service.unchanged_blocks import UnchangedBlocks, check_no_global_hooks, has_hooks
from shared.adapters.structure import draws, dropout_of, own_dropout
from shared.errors import AdapterError, ProtocolError, TensorError
from shared.models.families import Family
from shared.models.split_range import SplitRange

_MADE_OF_OTHERS = frozenset(
    {
        "assistant_tokenizer",
        "attention_mask",
        "cache_position",
        "causal_mask",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "inputs_embeds",
        "layer_past",
        "num_items_in_batch",
        "output_hidden_states",
        "position_embeddings",
        "return_dict",
        "tokenizer",
        "use_cache",
    }
)
"""Keywords of a block that the trunk makes itself of what it is sent, or that tell it nothing."""

_OF_FLASH = frozenset({"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"})
"""Where packed texts begin, for attention that has no mask; the trunk's kinds (eager and sdpa) read
the mask, which transformers makes of the positions."""


@dataclass
class _Call:
    """One forward of the base model, while it goes through the trunk's blocks."""

    mask: Any = None
    """As the base model was given it."""
    one_by_one: bool | None = None
    """Whether each block carries its own hidden states; None before the first of them."""
    done: bool = False
    """Whether the last of the blocks was passed."""
    past: tuple[torch.Tensor, ...] = ()
    """Keys and values before everything, of all blocks."""
    cached: int | None = None
    """Tokens that the cache had before; None before the first block."""
    dropout_key: bytes | None = None
    """None until a block draws."""
    switches: Switches = ()
    """As the call began."""


class Passage:
    """From the trunk's blocks of one model to the trunk. A copy of the model has one of its own.

    Args:
        model: The client's model.
        family: Of the model.
        split: The trunk's blocks.
        function: What computes them.
        secret: Of dropout keys; None takes the user's own.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        split: SplitRange,
        function: TrunkFunction,
        secret: bytes | None = None,
    ) -> None:
        self._secret = secret
        self._model, self._family, self._split = model, family, split
        self.function = function
        self._here = threading.local()
        self._unchanged = UnchangedBlocks(self.blocks(), model.config)
        blocks = [block for _, block in self.blocks()[: self._count]]
        self._watch = AdapterWatch(model, blocks)
        self._looked: tuple[object, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = threading.local()

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The trunk's blocks by full name, and what else is an input of its function."""
        base: Any = getattr(self._model, self._family.base)
        layers = getattr(base, self._family.layers)._modules
        found = [
            (f"{self._family.layer_prefix}{i}", layers[str(i)])
            for i in range(self._split.start, self._split.end)
        ]
        if (rotary := getattr(base, "rotary_emb", None)) is not None:
            found.append((f"{self._family.base}.rotary_emb", rotary))
        return found

    def adapters(self) -> Adapters:
        """The adapters in the blocks as they are now.

        Raises:
            AdapterError: If they cannot be had on a trunk.
        """
        blocks = self.blocks()
        self._unchanged.check(blocks, self._model.config)
        check_no_global_hooks()
        configs = getattr(self._model, "peft_config", None) or {}
        tensors = adapter_tensors(blocks, self.function.dtype)
        layers = getattr(getattr(self._model, self._family.base), self._family.layers)
        check_shared(layers, tensors, self.function.held)
        self._watch.tensors = [tensor for _, tensor in tensors]
        self._looked = self._watch.switches(), self._watch.writes()
        return adapter_structure(blocks, configs), tensors

    def check(self) -> None:
        """Has the trunk build the adapters, before anything is trained.

        Raises:
            TrunklineError: If they cannot be had on a trunk, or on this one.
        """
        with torch.no_grad():
            hidden_11D = torch.zeros(1, 1, self.function.session.info.hidden_size)
            self.function(hidden_11D, ForwardCall(attention=self._attention()), self.adapters())

    def watch_calls(self) -> None:
        """Notes the beginning and the end of every forward of the base model, by thread.

        Blocks are given the mask that transformers made of it; the trunk's own forward makes that
        itself and needs the original.
        """
        base: Any = getattr(self._model, self._family.base)
        base.register_forward_pre_hook(_Begin(self), with_kwargs=True)
        base.register_forward_hook(_End(self))

    def begin(self, mask: Any) -> None:
        """Takes the mask of the forward that this thread is about to run.

        Raises:
            InvalidInputError: In a forked process, where the blocks before may hang already.
        """
        self.function.session.check_process()
        self._here.call = _Call(mask, switches=self._watch.switches())

    def end(self) -> None:
        """Looks whether the forward that this thread has run was one.

        Raises:
            AdapterError: If adapters were switched meanwhile.
        """
        check_same(self._here.call.switches, self._watch.switches())

    def pass_block(
        self,
        index: int,
        hidden_BTD: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: Any,
        training: bool,
    ) -> torch.Tensor:
        """What one block of the trunk gives, in the forward that this thread runs.

        Raises:
            AdapterError: If no forward runs, or it asks for what is not sent.
            TrunklineError: What :meth:`through` raises.
        """
        call: _Call | None = getattr(self._here, "call", None)
        if call is None or call.done:
            raise AdapterError(
                f"block {index} of the trunk was called by itself: accepted are calls of the whole "
                f"model, in which it has its place"
            )
        call.done = index == self._split.end - 1
        if call.one_by_one is None:
            call.one_by_one = self._is_looked_into()
        if call.one_by_one:
            blocks = (index, index + 1)
            return self.through(hidden_BTD, position_ids, cache, training, blocks)
        if index > self._split.start:
            return hidden_BTD
        return self.through(hidden_BTD, position_ids, cache, training)

    def _is_looked_into(self) -> bool:
        wanted = _active_collector.get() or {}
        if foreign := [name for name in wanted if "hidden_states" not in name]:
            raise AdapterError(
                f"{', '.join(foreign)} of the trunk's blocks are not sent: accepted are hidden "
                f"states"
            )
        return bool(wanted) or any(has_hooks(b) for _, b in self.blocks()[: self._count])

    @property
    def _count(self) -> int:
        return self._split.end - self._split.start

    def through(
        self,
        hidden_BTD: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: Any,
        training: bool,
        blocks: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Carries hidden states [B, T, D] through the trunk.

        Args:
            hidden_BTD: Of the new tokens.
            position_ids: [B or 1, T].
            cache: transformers'; None without.
            training: Mode of the blocks.
            blocks: First and end of those that are passed; None for all.

        Raises:
            AdapterError: If an adapter cannot be had on a trunk, or the call asks for what is not
                sent.
            ProtocolError: If there is a cache that gradients would pass, or one of another kind.
            TensorError: If the attention mask is shorter than the tokens.
            TrunklineError: What the trunk answered, if it refused.
        """
        current: _Call = self._here.call
        check_same(current.switches, self._watch.switches())
        training = self._draws(training)
        adapters = functools.cache(self.adapters)
        layer = None if cache is None else self._cache_layer(cache, current)
        is_first, past = current.cached is None, current.past
        if current.cached is None:
            current.cached = 0 if layer is None else layer.get_seq_length()
        cached = current.cached
        filled = cached and not past
        passes = layer is not None and filled and torch.is_grad_enabled()
        if passes or (layer is not None and is_first and layer.skipped):
            raise ProtocolError(
                "gradients do not pass a cache of the trunk's blocks: run every forward that "
                "fills or reads it under torch.no_grad()"
            )
        mask = self._mask(current.mask, cached + hidden_BTD.shape[1])
        names = mixed_adapter_names(self.blocks())
        device = hidden_BTD.device.type
        if current.dropout_key is None:
            current.dropout_key = self._dropout_key(training, adapters)
        call = ForwardCall(
            mask,
            position_ids,
            training=training,
            past=past,
            adapter_names=names,
            attention=self._attention(),
            dropout_key=current.dropout_key,
            in_float32=self.function.in_float32_here,
            autocast=torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else None,
            blocks=blocks,
        )
        if layer is None or torch.is_grad_enabled():
            if layer is not None:
                # In training the default configuration makes a cache that nothing reads.
                layer.skipped = True
            return self.function(hidden_BTD, call, adapters())
        if filled and hidden_BTD.shape[1] == 1 and mask is not None and _hides_nothing(mask):
            mask = None  # hides nothing from a single token, and would be longer with every one
        edits = layer.take_edits(hidden_BTD.shape[1]) if is_first else []
        call = replace(
            call,
            attention_mask=mask,
            cache_edits=edits,
            past=past if is_first else (),  # the first block's forward puts it into all of them
            cached_tokens=0 if past and is_first else cached,
        )
        as_before = (current.switches, self._watch.writes()) == self._looked
        decoding = hidden_BTD.shape[1] == 1 and bool(call.cached_tokens) and as_before
        return self.function.forward_cached(hidden_BTD, call, adapters, layer, decoding)

    def _draws(self, training: bool) -> bool:
        """The mode of the blocks' dropout layers; without any, that of the blocks.

        Raises:
            AdapterError: If some are in training mode and some are not.
        """
        modes = {
            module.training
            for _, block in self.blocks()
            for module in block.modules()
            if dropout_of(module) or own_dropout(module)
        }
        if len(modes) > 1:
            raise AdapterError(
                "some dropout layers of the trunk's blocks are in training mode and some are not: "
                "accepted is one mode for all, as model.train() and model.eval() set it"
            )
        return modes.pop() if modes else training

    def _dropout_key(self, training: bool, adapters: Callable[[], Adapters]) -> bytes:
        """Drawn only where the trunk's blocks draw, or the client's generator would move alone."""
        if not (training and draws(adapters()[0])):
            return b""
        return dropout_key(self._secret or user_secret())

    def _attention(self) -> str:
        config: Any = self._model.config
        return str(config._attn_implementation)

    def _cache_layer(self, cache: Any, call: _Call) -> RemoteCacheLayer:
        """What stands for the trunk's own cache, in the place of its first block's.

        Keys and values that are there already (prefix tuning, another model's) go with the call.
        """
        start, end = self._split.start, self._split.end
        while len(cache.layers) < end:
            cache.layers.append(cache.layer_class_to_replicate())
        if not isinstance(cache.layers[start], RemoteCacheLayer):
            call.past = past_of(cache.layers[start:end])
            put_remote_layers(cache, start, end, self.function, call.past)
        found: RemoteCacheLayer = cache.layers[start]
        return found

    def _mask(self, mask: Any, total: int) -> torch.Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor):
            raise TensorError(
                f"attention_mask is a {type(mask).__name__}: accepted are tensors [B, S] and "
                f"[B, 1, T, S]"
            )
        # Of a static cache it covers slots that are not filled.
        seen: torch.Tensor = mask[..., :total]
        if seen.ndim == 2:
            # As transformers has it, tokens that a mask does not cover are hidden.
            return nn.functional.pad(seen.to(torch.bool), (0, total - seen.shape[-1]))
        if seen.shape[-1] < total:
            raise TensorError(f"attention_mask covers {seen.shape[-1]} tokens, there are {total}")
        return seen


@dataclass(frozen=True)
class _Begin:
    """A hook that is copied and pickled with the model."""

    passage: Passage

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _signature(type(base).forward).bind_partial(base, *args, **kwargs).arguments
        self.passage.begin(given.get("attention_mask"))


@dataclass(frozen=True)
class _End:
    """A hook that is copied and pickled with the model."""

    passage: Passage

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.passage.end()


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


class TrunkBlock:
    """Mixed into the class of each of the trunk's blocks.

    Attributes:
        passage: Of the model; shared by its blocks.
        index: Of the block in the whole model.
    """

    passage: Passage
    index: int

    # The trunk decides what it keeps of a forward: a checkpoint here would only send it twice.
    gradient_checkpointing = property(lambda self: False, lambda self, value: None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        past_key_values: Any = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Returns the hidden states [B, T, D] behind the trunk.

        Raises:
            AdapterError: If a keyword is given that the trunk does not know.
            TrunklineError: What :meth:`Passage.pass_block` raises.
        """
        said = {n for n, value in kwargs.items() if value is not None and value is not False}
        foreign = said - _MADE_OF_OTHERS - _OF_FLASH
        if foreign:
            raise AdapterError(
                f"{', '.join(sorted(foreign))} given to the trunk's blocks: accepted are the "
                f"attention mask, positions and a cache"
            )
        if past_key_values is None:
            # GPT-2 passes the cache by position, GPT-NeoX under its older name.
            past_key_values = args[0] if args else kwargs.get("layer_past")
        training: bool = self.training  # type: ignore[attr-defined]
        return self.passage.pass_block(
            self.index, hidden_states, position_ids, past_key_values, training
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made as the program runs, so pickle is told how."""
        return _again, (type(self).__bases__[1],), self.__dict__


def _hides_nothing(mask: torch.Tensor) -> bool:
    return mask.dtype == torch.bool and bool(mask.all())


_classes: dict[type, type] = {}


def put_in_place(block: nn.Module, passage: Passage, index: int) -> None:
    """Makes a hollow block one that the trunk computes."""
    block.__class__ = _trunk_class(type(block))
    block.passage, block.index = passage, index  # type: ignore[assignment]


def _trunk_class(plain: type) -> type:
    if plain not in _classes:
        body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _classes[plain] = type(plain.__name__, (TrunkBlock, plain), body)
    return _classes[plain]


def _again(plain: type) -> Any:
    return object.__new__(_trunk_class(plain))
