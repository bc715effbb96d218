"""What a client with stock PEFT sends of an adapter in the trunk's blocks of a tiny GPT-2."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from client_service.adapter_structure import adapter_structure, adapter_tensors
from client_service.trunk_function import Adapters
from shared.models.families import family_of
from shared.models.split_range import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.skeleton import Fetch, Norms, skeleton_blocks
from shared.wire.structures import write_structure, write_values
from tests.models import tiny_model


def client_adapter(config: PeftConfig, split: SplitRange, **changes: Any) -> Adapters:
    """The structure of an adapter of frozen blocks, and its tensors.

    Args:
        config: Of the adapter, which computes with no base matrix.
        split: The trunk's blocks.
        changes: Of the tiny model's configuration.
    """
    whole = tiny_model("gpt2", **changes)
    vectors = {n: p for n, p in whole.named_parameters() if p.ndim < 2}
    family = family_of("gpt2")
    blocks = skeleton_blocks(whole.config, family, split, vectors, torch.float32, _no_matrices)
    holder = nn.ModuleDict({"h": nn.ModuleDict(dict(blocks))})
    plain = copy.deepcopy(config)
    plain.task_type = None  # of a whole model
    model: Any = nn.ModuleDict({"transformer": holder})
    peft_config = get_peft_model(model, plain).peft_config
    named = [(f"{family.layer_prefix}{name}", block) for name, block in blocks]
    found = adapter_tensors(named, torch.float32)
    own = {name for name, _ in whole.named_parameters()} | {n for n, _ in whole.named_buffers()}
    tensors = [(value, tensor) for value, tensor in found if value.names[0] not in own]
    return adapter_structure(named, peft_config), tensors


def first_push(adapters: Adapters) -> tuple[pb.AdapterState, dict[str, torch.Tensor]]:
    """The state that a new session is sent, version 1, and the tensors that go with it."""
    structure, tensors = adapters
    state = pb.AdapterState(
        version=1,
        structure=write_structure(structure),
        values=write_values(value for value, _ in tensors),
    )
    return state, {f"value/{i}": tensor.detach() for i, (_, tensor) in enumerate(tensors)}


def _no_matrices(name: str) -> tuple[Fetch, Norms]:
    def none() -> torch.Tensor:
        raise AssertionError(name)

    return none, (none, none)
