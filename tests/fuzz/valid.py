"""Sequences of messages that a real client could send, with any mixture of what there is to ask."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, VeraConfig

from shared.models.split_range import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import library_versions
from shared.wire.messages import to_frames
from tests.client_adapter import client_adapter, first_push
from tests.fuzz.script import SESSION_ID

HIDDEN_SIZE, HEADS = 64, 4
START, END = 2, 10

ADAPTERS: tuple[PeftConfig, ...] = (
    LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    LoraConfig(
        r=4, target_modules=["c_attn", "c_fc"], lora_dropout=0.1, bias="all", fan_in_fan_out=True
    ),
    AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["c_attn"],
                  fan_in_fan_out=True),
    IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
    VeraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
)  # fmt: skip


@functools.cache
def push_of(kind: int) -> tuple[pb.AdapterState, dict[str, torch.Tensor]]:
    """All there is of an adapter, as the first push of a session."""
    torch.manual_seed(kind)
    return first_push(client_adapter(ADAPTERS[kind], SplitRange(START, END)))


class Sequence:
    """Builds one session's messages.

    Args:
        rng: Decides.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.frames: list[bytes] = []
        self._ids = itertools.count(1)
        self._held: list[tuple[str, tuple[int, ...], bool]] = []
        self._requests = itertools.count()
        self.version = 0
        """Of the adapters that were pushed."""
        self.kind = rng.randrange(len(ADAPTERS))

    def send(
        self, request: pb.SessionRequest, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Adds a message under the next id."""
        request.id = next(self._ids)
        if self.rng.random() < 0.2:
            request.acknowledged = max(0, request.id - self.rng.randrange(1, 5))
        self.frames += to_frames(request, tensors or {})

    def open(self, **fields: Any) -> None:
        """Adds the message that begins a session."""
        given: dict[str, Any] = {"start_layer": START, "end_layer": END}
        given["library_versions"] = library_versions()
        self.send(pb.SessionRequest(open=pb.Open(**given | fields)))

    def resume(self, epoch: int) -> None:
        """Adds the message that goes on with the session of the stream before."""
        self.send(pb.SessionRequest(open=pb.Open(resume_session_id=SESSION_ID, epoch=epoch)))

    def anything(self) -> None:
        """Adds a message of any kind."""
        self.rng.choice(self._KINDS)(self)

    def train_step(self) -> None:
        """Adds a forward with what has changed, and its backward."""
        self.forward()
        self.backward()

    def forward(self, **fields: Any) -> None:
        """Adds a forward that keeps its graph, perhaps with a change of the adapter."""
        shape = (self.rng.randrange(1, 3), self.rng.randrange(1, 7), HIDDEN_SIZE)
        name = f"r{next(self._requests)}"
        tensors = self.inputs(shape)
        body = pb.Forward(request_id=name, keep_graph=True, training=True, dropout_key=bytes(32))
        if not self.version or self.rng.random() < 0.6:
            tensors |= self.push(body)
        body.state_version = self.version
        body.attention = self.rng.choice(("", "sdpa", "eager"))
        body.MergeFrom(pb.Forward(**fields))
        past = self.rng.random() < 0.1
        if past:
            size = (shape[0], HEADS, 3, HIDDEN_SIZE // HEADS)
            tensors |= {f"past/{i}": self.tensor(size) for i in range(2 * (END - START))}
        self._held.append((name, shape, past))
        self.send(pb.SessionRequest(forward=body), tensors)

    def push(self, body: pb.Forward) -> dict[str, torch.Tensor]:
        """Adds all there is to a forward, or a value that moved; returns the tensors."""
        state, tensors = push_of(self.kind)
        body.state.CopyFrom(state)
        if self.version and self.rng.random() < 0.7:
            number = self.rng.randrange(len(state.values))
            body.state.ClearField("structure")
            del body.state.values[:]
            body.state.values.append(state.values[number])
            body.state.since = self.version
            tensors = {"value/0": tensors[f"value/{number}"] * self.rng.choice((0.5, 1.0, -2.0))}
        self.version += 1
        body.state.version = body.state_version = self.version
        return tensors

    def backward(self) -> None:
        """Adds the backward of a forward that has none yet, if there is one."""
        if not self._held:
            return
        name, shape, past = self._held.pop(self.rng.randrange(len(self._held)))
        state, _ = push_of(self.kind)
        names = [value.names[0] for value in state.values if value.requires_grad]
        body = pb.Backward(request_id=name, need_input_gradient=self.rng.random() < 0.7)
        body.values.extend(self.rng.sample(names, self.rng.randrange(len(names) + 1)))
        body.past.extend([0, 3] if past else [])
        body.keep_graph = self.rng.random() < 0.2
        self.send(pb.SessionRequest(backward=body), {"gradient": self.tensor(shape)})

    def generate(self) -> None:
        """Adds forwards that extend a cache, and edit it."""
        batch, name = self.rng.randrange(1, 3), f"c{self.rng.randrange(2)}"
        reset = pb.CacheOp(reset=pb.CacheOp.Reset())
        body = pb.Forward(cache_id=name, cache_ops=[reset], state_version=self.version)
        self.send(pb.SessionRequest(forward=body), self.inputs((batch, 4, HIDDEN_SIZE), False))
        edits = (
            pb.CacheOp(reorder=pb.CacheOp.Reorder(indices=[0] * batch)),
            pb.CacheOp(crop=pb.CacheOp.Crop(tokens_to_remove=1)),
            pb.CacheOp(repeat=pb.CacheOp.Repeat(repeats=1)),
        )
        for _ in range(self.rng.randrange(1, 4)):
            ops = self.rng.sample(edits, 1)
            body = pb.Forward(cache_id=name, cache_ops=ops, state_version=self.version)
            self.send(pb.SessionRequest(forward=body), self.inputs((batch, 1, HIDDEN_SIZE), False))

    def mixed(self) -> None:
        """Adds a forward whose rows use an adapter, or none."""
        names = [self.rng.choice(("default", "__base__")) for _ in range(2)]
        body = pb.Forward(state_version=self.version, adapter_names=names)
        self.send(pb.SessionRequest(forward=body), self.inputs((2, 3, HIDDEN_SIZE)))

    def release(self) -> None:
        """Adds a release of all that is held, and of what never was."""
        names = [name for name, _, _ in self._held] + ["never"]
        self._held.clear()
        self.send(pb.SessionRequest(release=pb.Release(request_ids=names, cache_ids=["c0"])))

    def fetch(self) -> None:
        """Adds a look at the blocks' vectors, or the norms of a matrix."""
        matrix = f"transformer.h.{self.rng.randrange(START, END)}.attn.c_attn.weight"
        body = self.rng.choice((pb.Fetch(), pb.Fetch(norm_rows=[matrix], norm_columns=[matrix])))
        self.send(pb.SessionRequest(fetch=body))

    def inputs(self, shape: tuple[int, ...], masked: bool = True) -> dict[str, torch.Tensor]:
        """Hidden states, and sometimes a mask and positions."""
        tensors = {"hidden_states": self.tensor(shape)}
        if masked and self.rng.random() < 0.3:
            tensors["attention_mask"] = torch.ones(shape[:2], dtype=torch.int64)
        if masked and self.rng.random() < 0.3:
            tensors["position_ids"] = torch.arange(shape[1])[None]
        return tensors

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Small random numbers."""
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(shape, generator=generator) * 0.1

    _KINDS = (train_step, train_step, train_step, forward, backward, generate, mixed, release,
              fetch)  # fmt: skip


def sequence(rng: random.Random) -> list[bytes]:
    """The frames of one whole session."""
    built = Sequence(rng)
    built.open()
    for _ in range(rng.randrange(1, 6)):
        built.anything()
    return built.frames
