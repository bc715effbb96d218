"""A tenant's tree around the trunk's blocks, beside the whole PEFT model: one process, no wire."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeanutConfig, PveraConfig

from client_service.adapter_structure import (
    adapter_structure,
    adapter_tensors,
    mixed_adapter_names,
)
from shared.adapters.structure import Structure, Value, draws
from shared.errors import AdapterError, ModelMismatchError
from tests.one_process import Pair, compare, load_trunk, outcome, run_tree
from tests.peft_rows import ROWS, Row
from trunk_service.tenant_tree import TenantTree
from trunk_service.trunk import Trunk

FAMILIES = ("gpt2", "llama")
# Of the rows that the whole model itself can do here, those that the split one must as well.
FLOORS = {("llama", True): 67, ("llama", False): 58, ("gpt2", True): 47, ("gpt2", False): 42}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

Trunks = Callable[[str], Trunk]


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> Trunks:
    folder: Path = tmp_path_factory.mktemp("tiny")
    made = {family: load_trunk(family, folder) for family in FAMILIES}
    return made.__getitem__


def lora(family: str, **fields: Any) -> LoraConfig:
    names = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    return LoraConfig(
        r=4, target_modules=names, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", **fields
    )


def adapted(trunk: Trunk, family: str, **fields: Any) -> Pair:
    pair = Pair(family, trunk)
    pair.adapt_whole(lora(family, **fields))
    pair.adapt_split(lora(family, **fields))
    pair.perturb()
    return pair


def digest_of(trunk: Trunk) -> list[float]:
    return [float(t.double().sum()) for t in trunk._part.parameters()]


@pytest.mark.parametrize(
    ("family", "served"),
    [
        pytest.param("gpt2", True, marks=pytest.mark.slow),
        pytest.param("llama", True, marks=pytest.mark.slow),
        pytest.param("gpt2", False, marks=pytest.mark.slow),
        pytest.param("llama", False, marks=pytest.mark.slow),
    ],
)
def test_every_method_of_peft_is_equal_or_refused(
    trunks: Trunks, family: str, served: bool, subtests: Any
) -> None:
    trunk, equal = trunks(family), 0
    before = digest_of(trunk)
    for row in ROWS:
        with subtests.test(row.name):
            result = outcome(row, family, trunk, served)
            assert result.kind != "different", (result.why, result.differences)
            assert result.kind == "equal" or result.why
            if result.differences is not None:
                equal += 1
                effect = result.differences.effect
                assert math.isfinite(effect)
                assert effect > 1e-6 or not result.adapted
    assert equal >= FLOORS[family, served]
    assert digest_of(trunk) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_several_adapters_and_what_peft_does_with_them(trunks: Trunks, family: str) -> None:
    pair = adapted(trunks(family), family)
    norm = "ln_1" if family == "gpt2" else "input_layernorm"
    other = lora(family, modules_to_save=[norm], lora_alpha=3)
    for model in (pair.peft, pair.peft_split):
        torch.manual_seed(5)
        model.add_adapter("other", copy.deepcopy(other))
    tree = pair.tree()

    def both(action: Callable[[Any], None]) -> None:
        for model in (pair.peft, pair.peft_split):
            action(model)
        pair.push(tree)
        assert compare(pair, tree).worst == 0.0

    both(lambda model: None)
    both(lambda model: model.set_adapter("other"))
    pair.perturb(seed=9)
    both(lambda model: None)
    both(lambda model: model.base_model.set_adapter(["default", "other"]))
    built = tree.state.built
    both(lambda model: model.base_model.disable_adapter_layers())
    both(lambda model: model.base_model.enable_adapter_layers())

    def scale(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)

    both(scale)
    assert tree.state.built is built
    both(lambda model: model.base_model.set_adapter("default"))
    both(lambda model: model.delete_adapter("other"))
    assert tree.state.built is not built
    assert not [name for name in tree.leaves if "other" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_batch_with_an_adapter_of_its_own(trunks: Trunks, family: str) -> None:
    pair = adapted(trunks(family), family)
    for model in (pair.peft, pair.peft_split):
        torch.manual_seed(5)
        model.add_adapter("other", lora(family, init_lora_weights=False))
        model.eval()
    tree = pair.tree()
    tree.train(False)
    for names in (["other", "default"], ["__base__", "other"]):
        with pair.peft._enable_peft_forward_hooks(adapter_names=names):
            hidden, out, _ = pair.run_whole()
        with pair.peft_split._enable_peft_forward_hooks(adapter_names=names):
            told = mixed_adapter_names(pair.blocks)
            pair.structure()
        assert told == tuple(names)
        with tree.mixed(told):
            assert torch.equal(run_tree(tree, hidden), out)
        assert mixed_adapter_names(pair.blocks) == ()
        assert not torch.equal(run_tree(tree, hidden), out)
    with pytest.raises(AdapterError, match="adapter_names"), tree.mixed(["absent", "other"]):
        pass


def test_rows_with_adapters_of_their_own_are_refused_where_peft_cannot(trunks: Trunks) -> None:
    pair = Pair("gpt2", trunks("gpt2"))
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=9, target_modules=["c_attn"], fan_in_fan_out=True
    )
    pair.adapt_whole(config)
    pair.adapt_split(config)
    names, tree = ["default", "__base__"], pair.tree()
    tree.train(False)
    pair.peft.eval()
    with pytest.raises(TypeError), pair.peft._enable_peft_forward_hooks(adapter_names=names):
        pair.run_whole()
    with pytest.raises(AdapterError, match="adapter_names"), tree.mixed(names):
        run_tree(tree, torch.zeros(2, 3, 64))


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_inputs_as_well(trunks: Trunks, family: str) -> None:
    pair = adapted(trunks(family), family)
    tree = pair.tree()
    assert all("lora" in name for name in tree.leaves)  # the trunk's own do as well
    for model in (pair.whole, pair.split):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "ln_2" in name or "layernorm" in name)
    pair.push(tree)
    assert any("lora" not in name for name in tree.leaves)
    assert compare(pair, tree).worst == 0.0
    kept = [p.detach().clone() for p in pair.split.parameters()]
    pair.perturb(seed=11)
    pair.push_changed(tree)
    assert compare(pair, tree).worst == 0.0
    with torch.no_grad():
        for model in (pair.whole, pair.split):
            for parameter, value in zip(model.parameters(), kept, strict=True):
                if parameter.requires_grad:
                    parameter.copy_(value)
                    parameter.requires_grad_(False)
    pair.push(tree)
    assert all("lora" in name for name in tree.leaves)
    assert not tree.parameters


def test_a_graph_keeps_the_values_it_was_computed_with(trunks: Trunks) -> None:
    pair = adapted(trunks("llama"), "llama")
    tree = pair.tree()
    hidden = torch.randn(1, 5, 64, requires_grad=True)
    first, leaves = tree.state, tree.parameters
    out = run_tree(tree, hidden)
    expected = torch.autograd.grad(out.sum(), [hidden, *leaves], retain_graph=True)
    pair.perturb(seed=12)
    pair.push(tree)
    assert not torch.equal(run_tree(tree, hidden), out)
    found = torch.autograd.grad(out.sum(), [hidden, *leaves])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    second = tree.state
    tree.restore(first)
    assert torch.equal(run_tree(tree, hidden), out)
    tree.restore(second)
    assert not torch.equal(run_tree(tree, hidden), out)


def test_tensors_that_are_shared_no_more_are_told_apart(trunks: Trunks) -> None:
    pair = adapted(trunks("llama"), "llama")
    tree = pair.tree()
    names = sorted(n for n in tree.leaves if "q_proj.lora_A" in n)
    one, two = torch.randn(4, 64), torch.randn(4, 64)
    tree.update(None, [Value(tuple(names), True)], [one])
    assert tree.model.get_parameter(names[0]) is tree.model.get_parameter(names[1])
    tree.update(None, [Value((names[1],), True), Value((names[0],), True)], [two, one])
    tree.restore(tree.state)
    assert torch.equal(tree.model.get_parameter(names[0]), one)
    assert torch.equal(tree.model.get_parameter(names[1]), two)


def _without_value(structure: Structure, values: list[Any]) -> None:
    del values[next(i for i, (v, _) in enumerate(values) if "lora" in v.names[0])]


def _of_another_shape(structure: Structure, values: list[Any]) -> None:
    i = next(i for i, (v, _) in enumerate(values) if "lora" in v.names[0])
    values[i] = (values[i][0], values[i][1][:-1])


def _without_place(structure: Structure, values: list[Any]) -> None:
    values.append((Value(("model.layers.1.mlp.up_proj.lora_C.default.weight",)), torch.ones(2)))


def _for_a_matrix(structure: Structure, values: list[Any]) -> None:
    values.append((Value(("model.layers.1.mlp.down_proj.weight",)), torch.ones(64, 128)))


def _as_a_buffer(structure: Structure, values: list[Any]) -> None:
    i = next(i for i, (v, _) in enumerate(values) if "lora" in v.names[0])
    values[i] = (dataclasses.replace(values[i][0], is_buffer=True), values[i][1])


def _changed(index: int, **fields: Any) -> Any:
    def change(structure: Structure, values: list[Any]) -> Structure:
        layers = list(structure.layers)
        at = [i for i, layer in enumerate(layers) if layer.active][index]
        layers[at] = dataclasses.replace(layers[at], **fields)
        return Structure(structure.adapters, tuple(layers))

    return change


def _without_layer(structure: Structure, values: list[Any]) -> Structure:
    return Structure(structure.adapters, structure.layers[1:])


def _layer_twice(structure: Structure, values: list[Any]) -> Structure:
    return Structure(structure.adapters, (*structure.layers, structure.layers[0]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_without_value, "no value for .*lora_A"),
        (_of_another_shape, r"\(4, 64\) on the trunk, \(3, 64\) at the client"),
        (_without_place, "the trunk has no .*lora_C"),
        (_for_a_matrix, "base matrix"),
        (_as_a_buffer, "parameter on the trunk alone"),
        (_changed(0, outside={}), "outside its parameters"),
        (_changed(-1, outside={"indices": "00"}), "outside its parameters"),
        (_changed(0, active=("stranger",)), "has no adapter stranger"),
        (_changed(0, scaling={"stranger": 1.0}), "scales other adapters"),
        (_changed(0, module="model.layers.7.mlp"), "no such layer"),
        (_without_layer, "no such layer"),
        (_layer_twice, "twice"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_a_refused_update_leaves_the_tree_as_it_was(
    trunks: Trunks, change: Any, why: str, again: bool
) -> None:
    pair = adapted(trunks("llama"), "llama")
    tree = pair.tree()
    hidden = torch.randn(1, 5, 64)
    state, out = tree.state, run_tree(tree, hidden)
    if not again:  # another adapter: another tree
        for model in (pair.peft, pair.peft_split):
            model.add_adapter("other", lora("llama"))
    values, structure = pair.tensors(), pair.structure()
    if change is _without_value:
        tree = TenantTree(pair.part)
        state, out = tree.state, run_tree(tree, hidden)
    structure = change(structure, values) or structure
    with pytest.raises(AdapterError, match=why):
        tree.update(structure, [v for v, _ in values], [t for _, t in values])
    assert tree.state is state
    assert torch.equal(run_tree(tree, hidden), out)


def test_what_would_have_no_effect_is_refused_at_the_client(trunks: Trunks) -> None:
    pair = adapted(trunks("llama"), "llama")
    blocks = pair.blocks
    layer = blocks[0][1].get_submodule("mlp.up_proj")
    own = blocks[0][1].register_forward_hook(lambda *args: None)
    pair.structure()  # blocks themselves are called at the client
    own.remove()
    hook = layer.register_forward_hook(lambda *args: None)
    with pytest.raises(AdapterError, match=r"mlp\.up_proj was given a hook"):
        pair.structure()
    hook.remove()
    layer.forward = layer.forward
    with pytest.raises(AdapterError, match="a forward of its own"):
        pair.structure()
    del layer.forward
    layer.merged_adapters = ["default"]
    with pytest.raises(AdapterError, match="export --merge"):
        pair.structure()
    layer.merged_adapters = []
    with pytest.raises(ModelMismatchError, match="bfloat16"):
        adapter_tensors(blocks, torch.bfloat16)
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"base_layer\.weight is to be trained"):
        pair.tensors()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (PveraConfig(target_modules=["q_proj"]), "PVERA .* draw their own random numbers"),
        (PeanutConfig(target_modules=["q_proj"], act_fn="gelu"), "act_fn='gelu' is not accepted"),
        (lora("llama", alora_invocation_tokens=[3]), r"alora_invocation_tokens=\[3\]"),
    ],
)
def test_what_a_trunk_cannot_have_is_refused_by_name(trunks: Trunks, config: Any, why: str) -> None:
    pair = Pair("llama", trunks("llama"))
    pair.adapt_split(config)
    with pytest.raises(AdapterError, match=why):
        pair.structure()


def test_only_names_numbers_and_enumerated_words_are_told(trunks: Trunks) -> None:
    pair = Pair("llama", trunks("llama"))
    pair.adapt_split(
        LoraConfig(
            r=4,
            target_modules=r".*\.[12]\.(self_attn|mlp)\.(q_proj|up_proj)",
            rank_pattern={"q_p.*": 2},
            init_lora_weights="gaussian",
            use_rslora=True,
            base_model_name_or_path="/home/me/model",
            bias="lora_only",
        )
    )
    (spec,) = pair.structure().adapters
    prefix = "model.layers."
    assert spec.target_modules == tuple(
        f"{prefix}{i}.{name}" for i in (1, 2) for name in ("self_attn.q_proj", "mlp.up_proj")
    )
    assert spec.ranks == {f"{prefix}{i}.self_attn.q_proj": 2 for i in (1, 2)}
    assert spec.settings == {"r": 4, "use_rslora": True}


def test_dropout_is_told(trunks: Trunks) -> None:
    pair = adapted(trunks("llama"), "llama", lora_dropout=0.25)
    tree = pair.tree()
    structure = pair.structure()
    assert draws(structure)
    for module in pair.split.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not draws(pair.structure())
    pair.push(tree)
    assert compare(pair, tree).worst != 0.0  # the whole model still has its own
    for module in pair.whole.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert compare(pair, tree).worst == 0.0


@pytest.mark.slow
def test_building_leaves_the_generator_and_the_shared_flags_alone(trunks: Trunks) -> None:
    trunk = trunks("gpt2")
    for row in ROWS:
        with contextlib.suppress(Exception):
            pair = Pair("gpt2", trunk)
            pair.adapt_split(row.config("gpt2"))
            values, tensors = zip(*pair.tensors(), strict=True)
            structure, tree = pair.structure(), TenantTree(trunk._part)
            torch.manual_seed(4)
            before = torch.get_rng_state()
            with contextlib.suppress(AdapterError):
                tree.update(structure, values, tensors)
            assert torch.equal(torch.get_rng_state(), before), row.name
            assert not any(p.requires_grad for p in trunk._part.parameters()), row.name


def test_an_unknown_configuration_is_of_no_interest_where_it_is_not(trunks: Trunks) -> None:
    row = Row("", "LoraConfig", lambda family: {"layers_to_transform": [0]})
    pair = Pair("gpt2", trunks("gpt2"))
    config = row.config("gpt2")
    pair.adapt_split(config)
    structure = adapter_structure(pair.blocks, {"default": config})
    assert structure.adapters == ()
    assert all(not layer.outside for layer in structure.layers)
