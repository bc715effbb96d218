"""Single rows of large linear layers on all threads: to the bits of one thread, or not at all.

Which layers these are is the processor's and MKL's affair, so no test counts them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.models import single_row
from shared.models.onednn import OneDnnLinear, can_use_onednn, use_onednn
from shared.models.single_row import SpreadConv1D, SpreadLinear, spread_single_rows
from tests.models import tiny_model

pytestmark = pytest.mark.numeric


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what was computed on all threads."""
    seen, ordinary = list[torch.Size](), single_row.product

    def product(input: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(input.shape)
        return ordinary(input, *others)

    monkeypatch.setattr(single_row, "product", product)
    return seen


def build(kind: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias=bias)
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("kind, bias", [("linear", True), ("linear", False), ("conv1d", True)])
@pytest.mark.parametrize("size", [(64, 128), (96, 1000), (256, 517), (768, 3071)], ids=str)
def test_bits_are_the_same_or_the_layer_stays(
    kind: str, bias: bool, size: tuple[int, int], products: list[torch.Size]
) -> None:
    plain = build(kind, *size, bias)
    spread = copy.deepcopy(plain)
    changed = spread_single_rows(spread, large_bytes=0)
    classes = (nn.Linear, SpreadLinear) if kind == "linear" else (Conv1D, SpreadConv1D)
    assert type(spread) is classes[changed]
    products.clear()
    for shape in ((size[0],), (1, size[0]), (1, 1, size[0])):
        row = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(spread(row), plain(row))
    assert len(products) == 3 * changed


def test_other_work_is_done_as_ever(products: list[torch.Size]) -> None:
    plain = build("linear", 64, 256, True)
    spread: Any = copy.deepcopy(plain)
    spread.__class__, spread.groups = SpreadLinear, 2  # whether or not its bits are the same
    rows, row = torch.randn(2, 64), torch.randn(1, 64)
    with torch.no_grad():
        assert torch.equal(spread(rows), plain(rows))
        assert spread(row[:0]).shape == (0, 256)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(spread(row), plain(row))
        torch.set_num_threads(1)
        assert torch.equal(spread(row), plain(row))
        torch.set_num_threads(2)
        half = copy.deepcopy(spread).to(torch.bfloat16)
        assert half(row.bfloat16()).dtype == torch.bfloat16
    spread(row).sum().backward()  # a graph is torch's own
    plain(row).sum().backward()
    assert torch.equal(spread.get_parameter("weight").grad, plain.get_parameter("weight").grad)
    assert not products


def test_a_layer_whose_bits_would_change_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = single_row.product
    monkeypatch.setattr(single_row, "product", lambda *given: ordinary(*given) * (1 + 1e-6))
    layer = build("linear", 64, 256, False)
    assert spread_single_rows(layer, large_bytes=0) == 0
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_s_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    layer = build("linear", 64, 256, False)
    expected = spread_single_rows(copy.deepcopy(layer), large_bytes=0)
    torch.set_default_dtype(dtype)
    try:
        assert spread_single_rows(layer, large_bytes=0) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_onednn_takes_over() -> None:
    layer: Any = build("linear", 64, 256, False).requires_grad_(False)
    layer.__class__, layer.groups = SpreadLinear, 2
    assert can_use_onednn(layer, torch.float32, torch.device("cpu"))
    use_onednn(layer, torch.float32, torch.device("cpu"))
    assert type(layer) is OneDnnLinear and not hasattr(layer, "groups")


def test_small_layers_and_one_thread_stay() -> None:
    layer = build("linear", 64, 256, False)
    assert spread_single_rows(layer) == 0
    torch.set_num_threads(1)
    assert spread_single_rows(layer, large_bytes=0) == 0
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generating_with_an_adapter_gives_the_same_tokens_and_logits(family: str) -> None:
    plain, spread = tiny_model(family), tiny_model(family)
    spread_single_rows(spread, large_bytes=0)
    both = []
    for model in (spread, plain):
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            target_modules="all-linear",
            init_lora_weights=False,
            fan_in_fan_out=family == "gpt2",
        )
        torch.manual_seed(3)
        both.append(get_peft_model(model, config).eval())
    ours, whole = both
    ids = torch.tensor([[5, 9, 300, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    scores = {"return_dict_in_generate": True, "output_scores": True}
    found, expected = (m.generate(input_ids=ids, **settings, **scores) for m in (ours, whole))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.scores, expected.scores))
