"""A tree around quantised blocks and blocks in bfloat16, beside PEFT on the blocks alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from client_service.adapter_structure import adapter_structure, adapter_tensors
from shared.adapters.structure import base_name
from shared.models.families import family_of
from shared.models.quantization import shared_tensors
from shared.skeleton import skeleton_blocks
from tests.models import save_tiny_model, tiny_model
from tests.one_process import SPLIT, Matrices, changes, run_tree
from trunk_service.tenant_tree import TenantTree
from trunk_service.trunk import Trunk

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("nf4", torch.float32), ("int8", torch.float32), ("", torch.bfloat16)],
)
def test_the_tree_is_what_peft_makes_of_such_blocks(
    tmp_path: Path, family: str, kind: str, dtype: torch.dtype
) -> None:
    path = save_tiny_model(family, tmp_path / family, **changes(family))
    trunk = Trunk.load(path, SPLIT, torch.device("cpu"), dtype, kind)
    part: Any = trunk._part
    config = LoraConfig(
        r=4,
        target_modules=["c_attn", "c_fc", "q_proj", "up_proj"],
        modules_to_save=["ln_1", "input_layernorm"],
        init_lora_weights=False,
    )
    reference: Any = copy.deepcopy(part, {id(t): t for t in shared_tensors(part)})
    get_peft_model(reference, copy.deepcopy(config))
    split = _hollow(family, trunk, dtype)
    adapted = get_peft_model(split, copy.deepcopy(config))
    prefix = family_of(family).layer_prefix
    blocks = [(f"{prefix}{i}", split.get_submodule(f"{prefix}{i}")) for i in (1, 2)]
    tensors = adapter_tensors(blocks, dtype)
    tree = TenantTree(part)
    structure = adapter_structure(blocks, adapted.peft_config)
    tree.update(structure, [value for value, _ in tensors], [tensor for _, tensor in tensors])

    values = {name: tensor for value, tensor in tensors for name in value.names}
    trained = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(values[base_name(name)])
    hidden = torch.randn(2, 5, part.config.hidden_size, dtype=dtype)
    expected = reference(inputs_embeds=hidden, use_cache=False).last_hidden_state
    found = run_tree(tree, hidden)
    assert torch.equal(found, expected)
    assert not torch.equal(found, run_tree(TenantTree(part), hidden))
    leaves = [tree.leaves[base_name(name)] for name in trained]
    gradients = (
        torch.autograd.grad(output.float().square().sum(), inputs)
        for output, inputs in ((expected, list(trained.values())), (found, leaves))
    )
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _hollow(family: str, trunk: Trunk, dtype: torch.dtype) -> Any:
    """The whole model with hollow blocks as this trunk's: linear where it quantised a Conv1D."""
    part: Any = trunk._part
    made = tiny_model(family, **changes(family)).to(dtype)
    rules = family_of(family)
    vectors = {n: p for n, p in part.named_parameters() if p.ndim < 2}
    linear = frozenset(n for n, m in part.named_modules() if isinstance(m, nn.Linear))
    kept = Matrices(trunk, served=False)
    blocks = skeleton_blocks(made.config, rules, SPLIT, vectors, dtype, kept, linear)
    layers = made.get_submodule(rules.layer_prefix.rstrip("."))
    for name, block in blocks:
        layers[int(name)] = block
    return made
