"""Sequences of messages that a real client could send, with any mixture of what there is to ask."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from client_service.adapter_structure import adapter_structure, adapter_tensors
from shared.models.families import family_of
from shared.models.split_range import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.skeleton import Fetch, skeleton_blocks
from shared.versions import library_versions
from shared.wire.messages import to_frames
from shared.wire.structures import write_structure, write_values
from tests.fuzz.script import SESSION_ID
from tests.models import tiny_model

HIDDEN_SIZE = 64
START, END = 2, 10

ADAPTERS: list[dict[str, Any]] = [
    {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]},
    {"peft_type": "LORA", "r": 4, "target_modules": ["c_attn", "c_fc"], "lora_dropout": 0.1},
    {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": ["c_proj"]},
    {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 9, "tinit": 1,
     "tfinal": 1, "target_modules": ["c_attn"]},
    {"peft_type": "IA3", "target_modules": ["c_attn"], "feedforward_modules": []},
    {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
]  # fmt: skip
OPTIMIZERS = (
    "adamw", "adam", "sgd", "adafactor", "transformers_adafactor", "adagrad", "adadelta", "adamax",
    "nadam", "radam", "rmsprop", "rprop", "asgd",
)  # fmt: skip

# (weight name inside a block, its shape) of the LoRA adapters above, by their number.
_LORA_WEIGHTS = {
    0: {"attn.c_attn.lora_A.weight": (2, 64), "attn.c_attn.lora_B.weight": (192, 2)},
    1: {
        "attn.c_attn.lora_A.weight": (4, 64),
        "attn.c_attn.lora_B.weight": (192, 4),
        "mlp.c_fc.lora_A.weight": (4, 64),
        "mlp.c_fc.lora_B.weight": (256, 4),
    },
}


class Sequence:
    """Builds one session's messages.

    Args:
        rng: Decides.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.frames: list[bytes] = []
        self._ids = itertools.count(1)
        self._held: list[tuple[str, tuple[int, ...]]] = []
        self._requests = itertools.count()
        self._step = 0
        self.kind = rng.choice((0, 0, 1, 1, 2, 3, 3, 4, 5))

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
        text = json.dumps(ADAPTERS[self.kind])
        given = {"start_layer": START, "end_layer": END, "peft_config_json": text, "seed": 1}
        opened = pb.Open(**given | fields, library_versions=library_versions())
        self.send(pb.SessionRequest(open=opened))

    def resume(self, epoch: int) -> None:
        """Adds the message that goes on with the session of the stream before."""
        self.send(pb.SessionRequest(open=pb.Open(resume_session_id=SESSION_ID, epoch=epoch)))

    def anything(self) -> None:
        """Adds a message of any kind."""
        self.rng.choice(self._KINDS)(self)

    def train_step(self) -> None:
        """Adds a forward, its backward and a step."""
        self.forward()
        self.backward()
        self.step()

    def forward(self) -> None:
        """Adds a forward that keeps its graph."""
        shape = (self.rng.randrange(1, 3), self.rng.randrange(1, 7), HIDDEN_SIZE)
        name = f"r{next(self._requests)}"
        self._held.append((name, shape))
        body = pb.Forward(request_id=name, keep_graph=True, training=True, step=self._step)
        body.micro = self.rng.randrange(3)
        self.send(pb.SessionRequest(forward=body), self._inputs(shape))

    def backward(self) -> None:
        """Adds the backward of a forward that has none yet, if there is one."""
        if not self._held:
            return
        name, shape = self._held.pop(self.rng.randrange(len(self._held)))
        body = pb.Backward(request_id=name, need_input_gradient=self.rng.random() < 0.7)
        body.reset_gradients = self.rng.random() < 0.1
        body.penalty_gradient = self.rng.choice((0.0, 0.0, 0.5))
        self.send(pb.SessionRequest(backward=body), {"gradient": self._tensor(shape)})

    def step(self) -> None:
        """Adds the next optimizer step."""
        self._step += 1
        optimizer = pb.Optimizer(name=OPTIMIZERS[0], hyperparameters={"lr": 0.01})
        self.send(pb.SessionRequest(step=pb.Step(step=self._step, gradient_scale=1.0,
                                                 optimizer=optimizer)))  # fmt: skip

    def generate(self) -> None:
        """Adds forwards that extend a cache, and edit it."""
        batch, name = self.rng.randrange(1, 3), f"c{self.rng.randrange(2)}"
        body = pb.Forward(cache_id=name, cache_ops=[pb.CacheOp(reset=pb.CacheOp.Reset())])
        self.send(pb.SessionRequest(forward=body), self._inputs((batch, 4, HIDDEN_SIZE), False))
        edits = (
            pb.CacheOp(reorder=pb.CacheOp.Reorder(indices=[0] * batch)),
            pb.CacheOp(crop=pb.CacheOp.Crop(tokens_to_remove=1)),
            pb.CacheOp(repeat=pb.CacheOp.Repeat(repeats=1)),
        )
        for _ in range(self.rng.randrange(1, 4)):
            body = pb.Forward(cache_id=name, cache_ops=self.rng.sample(edits, 1))
            self.send(pb.SessionRequest(forward=body), self._inputs((batch, 1, HIDDEN_SIZE), False))

    def release(self) -> None:
        """Adds a release of all that is held, and of what never was."""
        names = [name for name, _ in self._held] + ["never"]
        self._held.clear()
        self.send(pb.SessionRequest(release=pb.Release(request_ids=names, cache_ids=["c0"])))

    def snapshot(self) -> None:
        """Adds a snapshot of some parts."""
        parts = self.rng.sample([1, 2, 3], self.rng.randrange(4))
        body: Any = pb.Snapshot(parts=parts)
        self.send(pb.SessionRequest(snapshot=body))

    def restore(self, **fields: Any) -> None:
        """Adds weights, of a LoRA adapter."""
        weights = self.lora_weights()
        body = pb.Restore(**fields)
        if not weights and not fields:
            body.committed_step = self._step
        self.send(pb.SessionRequest(restore=body), weights)

    def adapters(self) -> None:
        """Adds a second adapter, uses it, and sometimes removes it."""
        text = json.dumps(self.rng.choice(ADAPTERS[:2]))
        name = f"a{self.rng.randrange(3)}"
        added = pb.AddAdapter(adapter=name, peft_config_json=text, seed=2)
        self.send(pb.SessionRequest(add_adapter=added))
        self.send(pb.SessionRequest(list_adapters=pb.ListAdapters()))
        body = pb.Forward(adapter=name, without_adapter=self.rng.random() < 0.2)
        self.send(pb.SessionRequest(forward=body), self._inputs((1, 2, HIDDEN_SIZE)))
        if self.rng.random() < 0.5:
            self.send(pb.SessionRequest(remove_adapter=pb.RemoveAdapter(adapter=name)))

    def allocate(self) -> None:
        """Adds AdaLoRA's two messages."""
        update = self._step > 0
        self.send(pb.SessionRequest(importance=pb.Importance(update=update, report=True)))
        kept = {
            f"keep/base_model.model.h.{block}.attn.c_attn.lora_E": torch.ones(4, dtype=torch.bool)
            for block in range(START, END)
        }
        self.send(pb.SessionRequest(allocate=pb.Allocate(last=self.rng.random() < 0.3)), kept)

    def function(self) -> None:
        """Adds forwards with the client's own adapter, a backward, a change, and a fetch."""
        structure, values, tensors = client_adapter()
        state = pb.AdapterState(version=1, structure=structure, values=values)
        name, shape = f"f{next(self._requests)}", (1, self.rng.randrange(1, 5), HIDDEN_SIZE)
        body = pb.Forward(request_id=name, keep_graph=True, state_version=1, state=state)
        body.training = self.rng.random() < 0.5
        body.attention = self.rng.choice(("", "sdpa", "eager"))
        body.dropout_key = bytes(32)
        pushed = {f"value/{i}": tensor for i, tensor in enumerate(tensors)}
        self.send(pb.SessionRequest(forward=body), self._inputs(shape) | pushed)
        wanted = [value.names[0] for value in values if value.requires_grad]
        back = pb.Backward(request_id=name, need_input_gradient=True, values=wanted)
        back.keep_graph = self.rng.random() < 0.3
        self.send(pb.SessionRequest(backward=back), {"gradient": self._tensor(shape)})
        change = pb.AdapterState(version=2, since=1, values=values[:1])
        body = pb.Forward(cache_id="f", state_version=2, state=change)
        pushed = {"value/0": tensors[0] * 0.5}
        self.send(pb.SessionRequest(forward=body), self._inputs(shape, False) | pushed)
        past = {f"past/{i}": self._tensor((1, 4, 3, 16)) for i in range(2 * (END - START))}
        body = pb.Forward(state_version=2)
        self.send(pb.SessionRequest(forward=body), self._inputs(shape, False) | past)
        self.send(pb.SessionRequest(fetch=pb.Fetch()))

    def lora_weights(self) -> dict[str, torch.Tensor]:
        """The weights of this sequence's adapter, under the names they travel by."""
        return {
            f"adapter/base_model.model.transformer.h.{block}.{name}": self._tensor(shape)
            for block in range(START, END)
            for name, shape in _LORA_WEIGHTS.get(self.kind, {}).items()
        }

    def _inputs(self, shape: tuple[int, ...], masked: bool = True) -> dict[str, torch.Tensor]:
        tensors = {"hidden_states": self._tensor(shape)}
        if masked and self.rng.random() < 0.3:
            tensors["attention_mask"] = torch.ones(shape[:2], dtype=torch.int64)
        if masked and self.rng.random() < 0.3:
            tensors["position_ids"] = torch.arange(shape[1])[None]
        return tensors

    def _tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(shape, generator=generator) * 0.1

    _KINDS = (train_step, train_step, forward, backward, step, generate, release, snapshot,
              restore, adapters, allocate, function, function)  # fmt: skip


@functools.cache
def client_adapter() -> tuple[pb.Structure, list[pb.Value], list[torch.Tensor]]:
    """What a client with stock PEFT's LoRA on two layers of each block sends of it."""
    whole = tiny_model("gpt2")
    vectors = {n: p for n, p in whole.named_parameters() if p.ndim < 2}
    family, split = family_of("gpt2"), SplitRange(START, END)
    blocks = skeleton_blocks(whole.config, family, split, vectors, torch.float32, _no_matrices)
    holder: Any = nn.ModuleDict({"h": nn.ModuleDict(blocks)})
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(nn.ModuleDict({"transformer": holder}), config)
    named = [(f"{family.layer_prefix}{name}", block) for name, block in blocks]
    structure = adapter_structure(named, model.peft_config)
    tensors = [(v, t) for v, t in adapter_tensors(named, torch.float32) if "lora" in v.names[0]]
    values = write_values(value for value, _ in tensors)
    return write_structure(structure), values, [tensor.detach() for _, tensor in tensors]


def _no_matrices(name: str, transposed: bool) -> Fetch:
    return lambda: torch.empty(0)  # LoRA computes with none


def sequence(rng: random.Random) -> list[bytes]:
    """The frames of one whole session."""
    built = Sequence(rng)
    built.open()
    for _ in range(rng.randrange(1, 6)):
        built.anything()
    return built.frames
