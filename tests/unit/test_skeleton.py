"""The trunk's blocks without their matrices, beside the whole model's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.errors import SharedWeightsError
from shared.models import SplitRange
from shared.models.families import FAMILIES, family_of
from shared.skeleton import Fetch, Norms, RemoteTensor, skeleton_blocks
from tests.models import tiny_model

SPLIT = SplitRange(1, 3)


class Weights:
    """What a trunk would give: the whole model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.asked: list[str] = []

    def of(self, name: str) -> tuple[Fetch, Norms]:
        return Asked(self, name), (Asked(self, name, "rows"), Asked(self, name, "columns"))


class Asked:
    def __init__(self, weights: Weights, name: str, norms: str = "") -> None:
        self.weights, self.name, self.norms = weights, name, norms

    def __call__(self) -> torch.Tensor:
        matrix = self.weights.model.get_parameter(self.name).detach()
        if self.norms:
            return torch.linalg.norm(matrix if self.norms == "rows" else matrix.T, dim=1)
        self.weights.asked.append(self.name)
        return matrix


class Chain(nn.Module):
    """Something to hold blocks under their full names."""

    def __init__(self, prefix: str, blocks: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        base, layers = prefix.rstrip(".").split(".")
        holder = nn.Module()
        holder.add_module(layers, nn.ModuleDict(blocks))
        self.add_module(base, holder)


def skeleton(whole: Any, weights: Weights | None = None) -> Any:
    family = family_of(whole.config.model_type)
    fetch_of = (weights or Weights(whole)).of
    vectors = {n: p for n, p in whole.named_parameters() if p.ndim < 2}
    blocks = skeleton_blocks(whole.config, family, SPLIT, vectors, torch.float32, fetch_of)
    return Chain(family.layer_prefix, blocks)


def parameters(whole: Any) -> dict[str, nn.Parameter]:
    """Those of the trunk's blocks of a whole model."""
    prefix = family_of(whole.config.model_type).layer_prefix
    wanted = tuple(f"{prefix}{i}." for i in range(SPLIT.start, SPLIT.end))
    return {n: p for n, p in whole.named_parameters() if n.startswith(wanted)}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_vectors_are_the_whole_model_s(family: str) -> None:
    whole = tiny_model(family)
    expected, made = parameters(whole), dict(skeleton(whole).named_parameters())
    assert list(made) == list(expected)
    for name, parameter in made.items():
        assert parameter.shape == expected[name].shape
        assert parameter.dtype == expected[name].dtype
        assert not parameter.requires_grad
        assert isinstance(parameter, RemoteTensor) == (parameter.ndim == 2)
        if parameter.ndim < 2:
            assert torch.equal(parameter, expected[name])
            assert parameter.data_ptr() != expected[name].data_ptr()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_moved_copied_saved_and_loaded_without_a_number(family: str) -> None:
    whole = tiny_model(family)
    weights = Weights(whole)
    made = skeleton(whole, weights)
    names = list(dict(made.named_parameters()))
    for changed in (
        made.to(torch.bfloat16),
        made.half(),
        made.to("meta"),
        skeleton(whole, weights).float(),
        copy.deepcopy(skeleton(whole, weights)),
        skeleton(whole, weights).requires_grad_(True).requires_grad_(False),
    ):
        assert list(dict(changed.named_parameters())) == names
        remote = [p for p in changed.parameters() if isinstance(p, RemoteTensor)]
        assert len(remote) == sum(p.ndim == 2 for p in changed.parameters())
        kinds = {(p.dtype, p.device) for p in changed.parameters()}
        assert len(kinds) == 1
    made = skeleton(whole, weights)
    vectors = [n for n, p in made.named_parameters() if p.ndim < 2]
    state = made.state_dict()
    assert list(state) == vectors
    other = skeleton(whole, weights)
    other.load_state_dict({n: t + 1 for n, t in state.items()})
    assert torch.equal(other.state_dict()[vectors[0]], state[vectors[0]] + 1)
    assert list(dict(other.named_parameters())) == names
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({n: p.detach() for n, p in parameters(whole).items()})
    assert not weights.asked


def test_a_pickled_one_is_hollow_again() -> None:
    whole = tiny_model("gpt2")
    made = skeleton(whole)
    again = pickle.loads(pickle.dumps(made))
    assert list(dict(again.named_parameters())) == list(dict(made.named_parameters()))
    layer = again.get_submodule("transformer.h.1.mlp.c_fc")
    assert isinstance(layer, Conv1D) and type(layer).__name__ == "Conv1D"
    assert isinstance(layer.weight, RemoteTensor)
    assert torch.equal(layer.weight.value(), whole.transformer.h[1].mlp.c_fc.weight)


def test_what_computes_with_a_matrix_gets_its_numbers() -> None:
    whole = tiny_model("llama")
    weights = Weights(whole)
    remote = skeleton(whole, weights).get_parameter("model.layers.1.mlp.up_proj.weight")
    real = whole.model.layers[1].mlp.up_proj.weight
    nothing = torch.zeros_like(real)
    for ours, theirs in ((remote, real), (remote.T, real.T), (remote + nothing, real)):
        assert torch.equal(torch.linalg.norm(ours, dim=1), torch.linalg.norm(theirs, dim=1))
    assert not weights.asked, "norms are given by themselves"
    assert torch.equal(torch.linalg.norm(remote, dim=0), torch.linalg.norm(real, dim=0))
    assert torch.equal((2 * remote).detach(), 2 * real.detach())
    assert torch.equal(remote.clone(), real) and not isinstance(remote.clone(), RemoteTensor)
    assert weights.asked and set(weights.asked) == {"model.layers.1.mlp.up_proj.weight"}


def test_one_layer_copied_by_itself_is_copied_to_be_trained() -> None:
    whole = tiny_model("llama")
    layer = skeleton(whole).get_submodule("model.layers.1.mlp.up_proj")
    alone = copy.deepcopy(layer)
    assert not isinstance(alone.weight, RemoteTensor)
    assert torch.equal(alone.weight, whole.model.layers[1].mlp.up_proj.weight)


def test_nothing_writes_into_a_matrix() -> None:
    whole = tiny_model("llama")
    weights = Weights(whole)
    split = skeleton(whole, weights)
    layer: Any = split.get_submodule("model.layers.1.mlp.up_proj")
    other: Any = split.get_submodule("model.layers.2.mlp.up_proj")
    real = torch.zeros(layer.weight.shape)
    with torch.no_grad():
        for write in (
            lambda: layer.weight.copy_(real),
            lambda: layer.weight.mul_(2),
            lambda: layer.weight.data.zero_(),
            lambda: layer.weight.normal_(),
            lambda: layer.weight.add_(real),
            lambda: layer.weight.__setitem__(0, 1.0),
            lambda: setattr(layer.weight, "data", real),
            lambda: torch.add(real, real, out=layer.weight.data),
            lambda: torch._foreach_mul_([real, layer.weight.data], 0.5),
            lambda: torch._foreach_lerp_([layer.weight.data], [real], 0.5),
            lambda: layer.weight.data.copy_(other.weight.data),
        ):
            with pytest.raises(SharedWeightsError, match="its tenants share"):
                write()
    assert not weights.asked
    with pytest.raises(TypeError, match="called at the client"):
        layer(torch.zeros(1, 64))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dora", [False, True])
def test_stock_peft_makes_the_whole_model_s_fresh_adapter(family: str, dora: bool) -> None:
    whole = tiny_model(family)
    weights = Weights(whole)
    made = skeleton(whole, weights)
    layers = list(family_of(family).linear_layers)
    config = LoraConfig(
        r=4,
        target_modules=layers,
        use_dora=dora,
        layers_to_transform=[1, 2],
        fan_in_fan_out=family == "gpt2",
    )
    fresh = []
    for model in (whole, made):
        torch.manual_seed(3)
        wrapped: Any = get_peft_model(model, copy.deepcopy(config))
        fresh.append({n: p for n, p in wrapped.named_parameters() if "lora" in n})
    assert list(fresh[0]) == list(fresh[1])
    for name, parameter in fresh[0].items():
        assert torch.equal(fresh[1][name], parameter)
        assert fresh[1][name].requires_grad
    assert not weights.asked
