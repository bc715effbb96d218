"""Quantised parts against the whole model as transformers quantises it."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModelForCausalLM
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from shared.errors import InvalidInputError
from shared.models import family_of, get_part_class
from shared.models.quantization import (
    QUANTIZATIONS,
    QuantizationError,
    prepare_loaded,
    quantize,
    shared_tensors,
    transposed,
)
from shared.models.stand_ins import GlobalLayers
from tests.models import VOCAB, save_tiny_model, tiny_model

pytestmark = pytest.mark.numeric

bnb = pytest.importorskip("bitsandbytes")

IDS = torch.randint(3, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
SPLITS = {"gpt2": (2, 10), "llama": (1, 4)}

each_family = pytest.mark.parametrize("family", list(SPLITS))
each_kind = pytest.mark.parametrize("kind", QUANTIZATIONS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_model(family, root / family) for family in SPLITS}


def load_whole(folder: Path, kind: str, device: str = "cpu") -> Any:
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        settings["bnb_4bit_compute_dtype"] = torch.float32
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**settings),
        dtype=torch.float32,
        device_map=device,
    )


def load_parts(folder: Path, family: str, kind: str, device: str = "cpu") -> list[Any]:
    start, end = SPLITS[family]
    ranges: dict[str, dict[str, int]] = {
        "bottom": {"end_layer": start},
        "trunk": {"start_layer": start, "end_layer": end},
        "top": {"start_layer": end},
    }
    loaded = (get_part_class(family, r).from_pretrained(folder, **k) for r, k in ranges.items())
    return [quantize(part.to(device), kind) for part in loaded]


def load_trunk(folder: Path, family: str, kind: str) -> Any:
    return load_parts(folder, family, kind)[1]


def new_tenant(part: Any) -> Any:
    return copy.deepcopy(part, {id(shared): shared for shared in shared_tensors(part)})


def chained(parts: Iterable[Any], embeds_BTD: torch.Tensor) -> torch.Tensor:
    common: dict[str, Any] = {"attention_mask": MASK.to(embeds_BTD.device), "use_cache": False}
    bottom, trunk, top = parts
    hidden_BTD = bottom(inputs_embeds=embeds_BTD, **common).last_hidden_state
    hidden_BTD = trunk(inputs_embeds=hidden_BTD, **common).last_hidden_state
    logits_BTV: torch.Tensor = top(inputs_embeds=hidden_BTD, **common).logits
    return logits_BTV


def whole_logits(whole: Any, embeds_BTD: torch.Tensor) -> torch.Tensor:
    mask = MASK.to(embeds_BTD.device)
    output = whole(inputs_embeds=embeds_BTD, attention_mask=mask, use_cache=False)
    logits_BTV: torch.Tensor = output.logits
    return logits_BTV


def embeds_of(whole: Any) -> torch.Tensor:
    embedding = whole.get_input_embeddings()
    embeds_BTD: torch.Tensor = embedding(IDS.to(embedding.weight.device)).detach()
    return embeds_BTD


def loss_of(logits_BTV: torch.Tensor) -> torch.Tensor:
    wanted = IDS[:, 1:].reshape(-1).to(logits_BTV.device)
    return cross_entropy(logits_BTV[:, :-1].reshape(-1, VOCAB), wanted)


def trainable(models: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    return {n: p for m in models for n, p in m.named_parameters() if p.requires_grad}


def adapted(whole: Any, parts: list[Any], config: PeftConfig) -> tuple[Any, list[Any]]:
    """Puts one adapter, away from where training starts, on the whole model and on the parts."""
    whole = PeftModelForCausalLM(whole, copy.deepcopy(config))
    wrapped = [PeftModelForCausalLM(part, copy.deepcopy(config)) for part in parts]
    theirs, ours = trainable([whole]), trainable(wrapped)
    assert theirs.keys() == ours.keys()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in theirs.items():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
            ours[name].copy_(weight)
    return whole, wrapped


def check_training(whole: Any, parts: list[Any]) -> None:
    """Same logits, same gradients of the adapter and of the inputs."""
    for model in (whole, *parts):
        model.train()
        model.zero_grad()
    theirs = embeds_of(whole).requires_grad_(True)
    ours = theirs.detach().clone().requires_grad_(True)
    expected, got = whole_logits(whole, theirs), chained(parts, ours)
    assert torch.equal(expected, got)
    loss_of(expected).backward()
    loss_of(got).backward()
    mine = trainable(parts)
    pairs = [(weight.grad, mine[name].grad) for name, weight in trainable([whole]).items()]
    for wanted, found in [(theirs.grad, ours.grad), *pairs]:
        assert wanted is not None and found is not None and wanted.abs().max() > 0
        assert torch.equal(wanted, found)


def check_evaluation(whole: Any, parts: list[Any]) -> None:
    for model in (whole, *parts):
        model.eval()
    embeds_BTD = embeds_of(whole)
    with torch.no_grad():
        assert torch.equal(whole_logits(whole, embeds_BTD), chained(parts, embeds_BTD))


def lora(family: str, **settings: Any) -> LoraConfig:
    targets = list(family_of(family).linear_layers)
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings)


def method(name: str, family: str) -> PeftConfig:
    targets = list(family_of(family).linear_layers)
    if name == "adalora":
        return AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=99, target_modules=targets
        )
    if name == "ia3":
        return IA3Config(
            task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=targets[-1:]
        )
    return lora(family, use_dora=name == "dora")


@each_family
@each_kind
def test_parts_are_the_whole_model_quantised_by_transformers(
    family: str, kind: str, folders: dict[str, Path]
) -> None:
    whole = prepare_loaded(load_whole(folders[family], kind))
    parts = load_parts(folders[family], family, kind)
    for training in (True, False, True):
        for model in (whole, *parts):
            model.train(training)
        embeds_BTD = embeds_of(whole)
        assert torch.equal(whole_logits(whole, embeds_BTD), chained(parts, embeds_BTD))
        with torch.no_grad():
            assert torch.equal(whole_logits(whole, embeds_BTD), chained(parts, embeds_BTD))


@each_family
@each_kind
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3"])
def test_training_an_adapter_is_that_of_the_whole_model(
    name: str, family: str, kind: str, folders: dict[str, Path]
) -> None:
    if (name, kind) == ("dora", "int8"):
        pytest.skip("PEFT's DoRA loses the scales of int8 weights on a CPU, in whole models too")
    whole, parts = adapted(
        prepare_loaded(load_whole(folders[family], kind)),
        load_parts(folders[family], family, kind),
        method(name, family),
    )
    check_training(whole, parts)
    check_evaluation(whole, parts)
    check_training(whole, parts)


@each_kind
def test_the_layers_of_an_adapter_are_pefts_quantised_ones(
    kind: str, folders: dict[str, Path]
) -> None:
    trunk = load_trunk(folders["gpt2"], "gpt2", kind)
    wrapped: Any = PeftModelForCausalLM(trunk, lora("gpt2", fan_in_fan_out=transposed(trunk)))
    adapted_layers = [m for m in wrapped.modules() if hasattr(m, "lora_A")]
    expected = "Linear4bit" if kind == "nf4" else "Linear8bitLt"
    assert len(adapted_layers) == 8 * 4
    assert {type(m).__module__ for m in adapted_layers} == {"peft.tuners.lora.bnb"}
    assert {type(m).__name__ for m in adapted_layers} == {expected}
    assert all("lora_" in name for name in trainable([wrapped]))


@each_kind
def test_only_the_linear_layers_of_blocks_change(kind: str) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    assert quantize(model, kind) is model
    changed = {n for n, m in model.named_modules() if type(m) is not type(before.get_submodule(n))}
    linear = {n for n, m in before.model.layers.named_modules() if isinstance(m, nn.Linear)}
    assert changed == {f"model.layers.{name}" for name in linear}
    assert not any(model.get_submodule(name).weight.requires_grad for name in changed)
    assert model.lm_head.weight.requires_grad
    assert not any(m.training for m in model.modules())


def test_a_model_with_a_hole_keeps_its_names_and_its_hole() -> None:
    model = tiny_model("gpt2", n_layer=3)
    first, _, last = model.transformer.h
    hole = nn.Identity()
    model.transformer.h = GlobalLayers([("0", first), ("remote", hole), ("11", last)])
    quantize(model, "nf4")
    assert model.transformer.h[1] is hole
    assert isinstance(model.get_submodule("transformer.h.11.mlp.c_fc"), bnb.nn.Linear4bit)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_conv1d_is_transposed_until_it_is_quantised() -> None:
    model = tiny_model("gpt2", n_layer=2)
    assert transposed(model)
    assert not transposed(quantize(model, "int8"))
    assert not transposed(tiny_model("llama"))


@each_family
@each_kind
def test_tenants_share_every_weight_and_scale(
    family: str, kind: str, folders: dict[str, Path]
) -> None:
    base = load_trunk(folders[family], family, kind)
    base.eval()
    hidden_BTD = torch.randn(2, 6, base.config.hidden_size)
    with torch.no_grad():
        expected = base(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state
    tenants = [new_tenant(base) for _ in range(2)]
    for tenant in tenants:
        assert tenant is not base and tenant.base is not base.base
        shared, own = shared_tensors(base), shared_tensors(tenant)
        assert [id(t) for t in own] == [id(t) for t in shared]
        assert storages(tenant) == storages(base)
    for tenant in [*tenants, new_tenant(tenants[0])]:
        with torch.no_grad():
            got = tenant(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state
        assert torch.equal(got, expected)


def storages(module: nn.Module) -> set[int]:
    """Where every tensor is that a deep search of the modules' attributes finds."""
    found: set[int] = set()
    seen: set[int] = set()
    pending: list[Any] = [vars(m) for m in module.modules()]
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.add(thing.untyped_storage().data_ptr())
        if isinstance(thing, dict):
            pending.extend(thing.values())
        elif type(thing).__module__.startswith("bitsandbytes"):
            pending.append(vars(thing))
    return found


@each_kind
def test_tenants_do_not_depend_on_who_runs_first(kind: str, folders: dict[str, Path]) -> None:
    base = load_trunk(folders["gpt2"], "gpt2", kind)
    first, second = new_tenant(base), new_tenant(base)
    hidden_BTD = torch.randn(2, 6, 64, requires_grad=True)
    outputs = [
        model.train()(inputs_embeds=hidden_BTD, use_cache=False).last_hidden_state
        for model in (second, base, first)
    ]
    gradients = [torch.autograd.grad(o.square().sum(), hidden_BTD)[0] for o in outputs]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_input_gradients_are_those_of_the_dequantised_weights(
    training: bool, kind: str, folders: dict[str, Path]
) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    layer = load_trunk(folders["gpt2"], "gpt2", kind).transformer.h[0].mlp.c_fc.train(training)
    input_BTD = torch.randn(2, 5, 64, requires_grad=True)
    output = layer(input_BTD)
    gradient = torch.randn_like(output)
    (got,) = torch.autograd.grad(output, input_BTD, gradient)
    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    torch.testing.assert_close(got, gradient @ weight, rtol=1e-5, atol=1e-6)


@each_kind
def test_a_row_depends_on_its_batch_only_in_int8_evaluation(
    kind: str, folders: dict[str, Path]
) -> None:
    layer = load_trunk(folders["gpt2"], "gpt2", kind).transformer.h[0].mlp.c_fc
    batch_ND = torch.randn(4, 64)
    batch_ND[3, 7] = 50.0  # an outlier: its column is then computed in floating point for all rows
    with torch.no_grad():
        for training in (True, False):
            layer.train(training)
            difference = (layer(batch_ND)[:2] - layer(batch_ND[:2])).abs().max()
            assert (difference > 1e-6) == (kind == "int8" and not training)


def test_int8_layers_keep_quiet(folders: dict[str, Path], caplog: Any) -> None:
    trunk = load_trunk(folders["gpt2"], "gpt2", "int8")
    with caplog.at_level(logging.DEBUG), torch.no_grad():
        trunk(inputs_embeds=torch.randn(1, 3, 64), use_cache=False)
    assert not [r for r in caplog.records if r.name.startswith("bitsandbytes")]


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match=r"'fp4'.*accepted: nf4, int8"):
        quantize(tiny_model("llama"), "fp4")


def test_blocks_are_not_quantised_twice() -> None:
    model = quantize(tiny_model("llama"), "int8")
    with pytest.raises(QuantizationError, match="no linear layers"):
        quantize(model, "nf4")


def test_without_bitsandbytes_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(QuantizationError, match=r"pip install trunkline\[quant\]"):
        quantize(tiny_model("llama"), "nf4")


@pytest.mark.gpu
@each_family
@each_kind
def test_parts_are_the_whole_model_on_a_gpu(
    family: str, kind: str, folders: dict[str, Path]
) -> None:
    whole, parts = adapted(
        prepare_loaded(load_whole(folders[family], kind, "cuda")),
        load_parts(folders[family], family, kind, "cuda"),
        lora(family),
    )
    check_training(whole, parts)
    check_evaluation(whole, parts)
