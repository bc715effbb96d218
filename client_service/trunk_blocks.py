"""The trunk's blocks in the client's model: the family's own classes, computed by the trunk.

The first of them carries hidden states through all; the others hand on what it got. Where somebody
looks between them, with a hook or for every block's hidden states, each carries its own.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import DynamicLayer
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
from client_service.unchanged_blocks import UnchangedBlocks, has_hooks
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
    given: dict[str | int, Any] = field(default_factory=dict)
    """What the block that is about to run was called with, by name or place."""
    runs: dict[int, int] = field(default_factory=dict)
    """How often each block has run."""
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
        layers = self._layers()
        config: Any = model.config
        self._depth = config.num_hidden_layers
        self._blocks = [
            (f"{family.layer_prefix}{i}", layers[str(i)]) for i in range(split.start, split.end)
        ]
        self._unchanged = UnchangedBlocks(self._blocks, self._inputs(), model.config)
        self._watch = AdapterWatch(model, [block for _, block in self._blocks])
        self._looked: tuple[object, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in self.__dict__.items() if n != "_here"} | {"_looked": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = threading.local()

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The trunk's blocks by full name, and what else is an input of its function."""
        return [*self._blocks, *self._inputs()]

    def _inputs(self) -> list[tuple[str, nn.Module]]:
        rotary = getattr(getattr(self._model, self._family.base), "rotary_emb", None)
        return [] if rotary is None else [(f"{self._family.base}.rotary_emb", rotary)]

    def _layers(self) -> dict[str, nn.Module]:
        """All blocks of the model, as they stand there now."""
        layers: Any = getattr(getattr(self._model, self._family.base), self._family.layers)
        found: dict[str, nn.Module] = layers._modules
        return found

    def adapters(self) -> Adapters:
        """The adapters in the blocks as they are now.

        Raises:
            AdapterError: If they cannot be had on a trunk.
        """
        blocks = self.blocks()
        self._unchanged.check(self._blocks, self._inputs(), self._model.config)
        there = self._layers()
        for index in range(*self._range):
            if isinstance(there.get(str(index)), BaseTunerLayer | AuxiliaryTrainingWrapper):
                raise AdapterError(
                    f"{self._family.layer_prefix}{index}: an adapter around a whole block of the "
                    f"trunk is not accepted: accepted are adapters of layers inside the blocks"
                )
        configs = getattr(self._model, "peft_config", None) or {}
        tensors = adapter_tensors(blocks, self.function.dtype)
        layers = getattr(getattr(self._model, self._family.base), self._family.layers)
        check_shared(layers, tensors, self.function.held)
        self._watch.look([tensor for _, tensor in tensors])
        self._looked = self._as_it_is()
        return adapter_structure(blocks, configs), tensors

    def check(self) -> None:
        """Has the trunk build the adapters, before anything is trained.

        Raises:
            TrunklineError: If they cannot be had on a trunk, or on this one.
        """
        with torch.no_grad():
            hidden_11D = torch.zeros(1, 1, self.function.session.info.hidden_size)
            self.function(hidden_11D, ForwardCall(attention=self._attention()), self.adapters())

    def _as_it_is(self) -> tuple[object, ...]:
        """What is as before where the adapters need not be looked at anew."""
        seen = self._unchanged.seen(self._blocks, self._inputs(), self._model.config)
        return self._watch.switches(), self._watch.writes(), seen

    def watch_calls(self) -> None:
        """Notes the beginning and the end of every forward of the base model, by thread.

        Blocks are given the mask that transformers made of it; the trunk's own forward makes that
        itself and needs the original.
        """
        base: Any = getattr(self._model, self._family.base)
        base.__class__ = _base_class(type(base))
        base.passage = self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, mask: Any) -> None:
        """Takes the mask of the forward that this thread is about to run.

        Raises:
            InvalidInputError: In a forked process, where the blocks before may hang already.
        """
        self.function.session.check_process()
        self._calls.append(_Call(mask, switches=self._watch.switches()))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, failed: bool = False) -> None:
        """Looks whether the forward that this thread has run was one.

        Args:
            failed: Whether it ended with an error of its own.

        Raises:
            AdapterError: If adapters were switched meanwhile.
        """
        call = self._calls.pop()
        if failed:
            return
        check_same(call.switches, self._watch.switches())
        if call.one_by_one is False and call.runs.keys() != set(range(*self._range)):
            raise AdapterError(
                f"this forward ended behind block {max(call.runs)} of the trunk, which has "
                f"computed all of its own: accepted are blocks left out before the call"
            )

    @property
    def _calls(self) -> list[_Call]:
        """Of this thread; a hook may call the model within a call."""
        if not hasattr(self._here, "calls"):
            self._here.calls = []
        calls: list[_Call] = self._here.calls
        return calls

    @property
    def _range(self) -> tuple[int, int]:
        return self._split.start, self._split.end

    def note(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes what a block is called with, before anybody's hooks or forward."""
        call = self._running(index)
        if call.one_by_one is None:
            call.one_by_one = self._is_looked_into()
        call.given = dict(enumerate(args[1:])) | kwargs
        call.given.pop("hidden_states", None)

    def _running(self, index: int) -> _Call:
        if not self._calls:
            raise AdapterError(
                f"block {index} of the trunk was called by itself: accepted are calls of the whole "
                f"model, in which it has its place"
            )
        return self._calls[-1]

    def pass_block(
        self,
        index: int,
        hidden_BTD: torch.Tensor,
        position_ids: torch.Tensor | None,
        cache: Any,
        training: bool,
        given: dict[str | int, Any],
    ) -> torch.Tensor:
        """What one block of the trunk gives, in the forward that this thread runs.

        Args:
            index: Of the block.
            hidden_BTD: What it is given.
            position_ids: [B or 1, T].
            cache: transformers'; None without.
            training: Mode of the block.
            given: All but the hidden states, as it arrives.

        Raises:
            AdapterError: If no forward runs, or it asks for what is not sent.
            TrunklineError: What :meth:`through` raises.
        """
        call = self._running(index)
        for name in call.given.keys() | given.keys():
            value, found = call.given.get(name), given.get(name)
            if value is not found and not isinstance(value, bool):
                raise AdapterError(
                    f"{name if isinstance(name, str) else 'an input'} of block {index} was changed "
                    f"on its way into it: the trunk makes its own of the model's attention_mask "
                    f"and position_ids; accepted are other hidden states, and masks for the whole "
                    f"model"
                )
        call.runs[index] = call.runs.get(index, 0) + 1
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
        if wanted or any(has_hooks(block) for _, block in self._blocks):
            return True
        # Blocks that stand elsewhere than they did, or will not be called.
        there = list(self._layers().values())[slice(*self._range)]
        own = [block for _, block in self._blocks]
        moved = len(there) != len(own) or any(a is not b for a, b in zip(there, own, strict=True))
        config: Any = self._model.config
        return moved or config.num_hidden_layers != self._depth

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
        if isinstance(hidden_BTD, FakeTensor) or torch._C._get_tracing_state() is not None:
            raise AdapterError(
                "the trunk's blocks are not traced or exported: accepted is torch.compile, which "
                "leaves them out"
            )
        current = self._calls[-1]
        check_same(current.switches, self._watch.switches())
        training = self._draws(training)
        adapters = functools.cache(self.adapters)
        layer = None if cache is None else self._cache_layer(cache, current)
        is_first, past = current.cached is None, current.past
        if current.cached is None:
            current.cached = 0 if layer is None else layer.get_seq_length()
        cached = current.cached
        filled = cached and not past
        graph = self._needs_graph(hidden_BTD, past, adapters)
        if filled and graph:
            raise ProtocolError(
                "gradients do not pass a cache of the trunk's blocks: run every forward that reads "
                "it under torch.no_grad()"
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
            dropout_key=_key_of_run(current, blocks),
            in_float32=self.function.in_float32_here,
            autocast=torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else None,
            blocks=blocks,
        )
        if layer is None:
            return self.function(hidden_BTD, call, adapters())
        edits = layer.take_edits(hidden_BTD.shape[1]) if is_first else []
        cached_call = replace(
            call,
            cache_edits=edits,
            past=past if is_first else (),  # the first block's forward puts it into all of them
            cached_tokens=0 if past and is_first else cached,
        )
        if graph:
            # In training the default configuration makes a cache that nothing reads. Whoever does
            # has it filled then.
            past = tuple(tensor.detach() for tensor in cached_call.past)
            unread = replace(cached_call, past=past)
            return self.function(
                hidden_BTD,
                call,
                adapters(),
                lambda computed: layer.history.append(replace(computed, call=unread)),
            )
        if filled and hidden_BTD.shape[1] == 1 and mask is not None and _hides_nothing(mask):
            mask = None  # hides nothing from a single token, and would be longer with every one
        call = replace(cached_call, attention_mask=mask)
        decoding = hidden_BTD.shape[1] == 1 and bool(call.cached_tokens)
        same = decoding and self._as_it_is() == self._looked
        return self.function.forward_cached(hidden_BTD, call, adapters, layer, same)

    def _needs_graph(
        self,
        hidden_BTD: torch.Tensor,
        past: tuple[torch.Tensor, ...],
        adapters: Callable[[], Adapters],
    ) -> bool:
        """Whether gradients are wanted of anything that comes in."""
        if not torch.is_grad_enabled():
            return False
        if any(tensor.requires_grad for tensor in (hidden_BTD, *past)):
            return True
        return any(tensor.requires_grad for _, tensor in adapters()[1])

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
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
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


def _key_of_run(call: _Call, blocks: tuple[int, int] | None) -> bytes:
    """The call's dropout key; of a block that runs again, another one made of it."""
    key = call.dropout_key or b""
    run = call.runs.get(blocks[0], 1) if blocks else 1
    return key if run == 1 or not key else hashlib.sha256(key + run.to_bytes(4, "little")).digest()


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


class TrunkBase:
    """Mixed into the class of the family's base model, whose forward goes through the trunk.

    Attributes:
        passage: Of the model.
    """

    passage: Passage

    def _through_the_trunk(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if "passage" not in self.__dict__:  # another model of this class, all of which is here
            return forward(self, *args, **kwargs)
        given = _signature(forward).bind_partial(self, *args, **kwargs).arguments
        self.passage.begin(given.get("attention_mask"))
        failed = True
        try:
            output = forward(self, *args, **kwargs)
            failed = False
        finally:
            self.passage.end(failed)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made as the program runs, so pickle is told how."""
        return _base_again, (type(self).__bases__[1],), self.__dict__


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
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the block, as torch does."""
        self.passage.note(self.index, args, kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

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
        given: dict[str | int, Any] = dict(enumerate(args)) | kwargs
        given |= {"past_key_values": past_key_values, "position_ids": position_ids}
        if past_key_values is None:
            # GPT-2 passes the cache by position, GPT-NeoX under its older name.
            past_key_values = args[0] if args else kwargs.get("layer_past")
        training: bool = self.training  # type: ignore[attr-defined]
        return self.passage.pass_block(
            self.index, hidden_states, position_ids, past_key_values, training, given
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made as the program runs, so pickle is told how."""
        return _again, (type(self).__bases__[1],), self.__dict__


def _hides_nothing(mask: torch.Tensor) -> bool:
    return mask.dtype == torch.bool and bool(mask.all())


_classes: dict[type, type] = {}
_base_classes: dict[type, type] = {}


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


def _base_class(plain: Any) -> type:
    if plain not in _base_classes:
        forward = plain.forward

        @functools.wraps(forward)
        def through_the_trunk(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._through_the_trunk(forward, *args, **kwargs)

        body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        made = type(plain.__name__, (TrunkBase, plain), body | {"forward": through_the_trunk})
        _base_classes[plain] = made
    return _base_classes[plain]


def _base_again(plain: type) -> Any:
    return object.__new__(_base_class(plain))
