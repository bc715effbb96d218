"""Linear layers by oneDNN: the same up to rounding, and ordinary where it is not for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from client_service import fused_loss
from client_service.fused_loss import fused_linear_cross_entropy
from shared.errors import InvalidInputError
from shared.models import onednn
from shared.models.onednn import use_onednn
from tests.models import VOCAB, tiny_model

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


def layers(kind: str, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """A frozen layer of 24 inputs and 40 outputs, and the same one by oneDNN."""
    torch.manual_seed(0)
    plain: nn.Module = nn.Linear(24, 40, bias=bias) if kind == "linear" else Conv1D(40, 24)
    plain.requires_grad_(False)
    ours = copy.deepcopy(plain)
    use_onednn(ours, torch.float32, CPU)
    assert type(ours) is not type(plain) and isinstance(ours, type(plain))
    return plain, ours


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what oneDNN was given."""
    seen: list[torch.Size] = []

    def product(input: torch.Tensor, *weights: torch.Tensor | None) -> Any:
        seen.append(input.shape)
        return ordinary(input, *weights)

    ordinary = onednn.product
    monkeypatch.setattr(onednn, "product", product)
    monkeypatch.setattr(fused_loss, "product", product)
    return seen


def passed(layer: nn.Module, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the gradient of its weighted sum with respect to the input."""
    input = input.clone().requires_grad_()
    output = layer(input)
    (output * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
    assert input.grad is not None
    return output.detach(), input.grad


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 5, 24), (3, 1, 2, 24)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_output_and_gradient_are_the_layer_s(
    kind: str, shape: tuple[int, ...], products: list[torch.Size]
) -> None:
    plain, ours = layers("linear" if kind == "no bias" else kind, bias=kind != "no bias")
    input = torch.randn(shape)
    for a, b in zip(passed(ours, input), passed(plain, input), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours(input), plain(input), rtol=0, atol=2e-6)
    strided = torch.randn(24, 9).T
    torch.testing.assert_close(ours(strided), plain(strided), rtol=0, atol=2e-6)
    assert products == [shape, (*shape[:-1], 40), shape, (9, 24)]


def test_a_gradient_without_memory_of_its_own_is_taken() -> None:
    plain, ours = layers("linear")
    gradients = []
    for layer in (plain, ours):
        input = torch.ones(5, 24, requires_grad=True)
        layer(input).sum().backward()  # one number, expanded
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_layer_that_is_trained_is_the_ordinary_one(kind: str, products: list[torch.Size]) -> None:
    plain, ours = (layer.requires_grad_(True) for layer in layers(kind))
    input = torch.randn(6, 24)
    for a, b in zip(passed(ours, input), passed(plain, input), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    assert ours(torch.empty(0, 24)).shape == (0, 40)
    assert not products


def test_autocast_and_other_dtypes_are_the_ordinary_one(products: list[torch.Size]) -> None:
    plain, ours = layers("linear")
    input = torch.randn(6, 24)
    with torch.autocast("cpu"):
        assert torch.equal(ours(input), plain(input))
    assert torch.equal(ours.double()(input.double()), plain.double()(input.double()))
    assert not products


def test_an_adapter_trains_around_it_as_around_the_layer(products: list[torch.Size]) -> None:
    targets = ["c_attn", "c_fc"]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=True)
    plain, ours = tiny_model("gpt2"), tiny_model("gpt2")
    use_onednn(ours, torch.float32, CPU)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(0, VOCAB, (2, 9))
    grads = []
    for model in (plain, ours):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config).eval()
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and products
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_the_fused_loss_by_onednn_is_the_other(
    ignored: float, monkeypatch: pytest.MonkeyPatch, products: list[torch.Size]
) -> None:
    monkeypatch.setattr("client_service.fused_loss.ONEDNN_CHUNK_ROWS", 8)
    plain, ours = layers("linear")
    labels = torch.randint(0, 40, (21,)).masked_fill(torch.rand(21) < ignored, -100)
    given, found = torch.randn(21, 24), []
    for layer in (plain, ours):
        assert isinstance(layer, nn.Linear)
        hidden = given.clone().requires_grad_()
        loss = fused_linear_cross_entropy(hidden, layer, labels, num_items=13)
        (3 * loss).backward()
        assert hidden.grad is not None
        found.append((loss.detach(), hidden.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    counted = int((labels != -100).sum())
    assert sum(shape[0] for shape in products) == 2 * counted  # logits and their gradients
    assert max((shape[0] for shape in products), default=0) <= 8


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float32, "cuda"), (torch.float32, "meta")]
)
def test_what_it_is_not_for_is_refused(dtype: torch.dtype, device: str) -> None:
    with pytest.raises(InvalidInputError, match=f"not {dtype} on {device}"):
        use_onednn(nn.Linear(2, 2), dtype, torch.device(device))


def test_a_model_without_a_plain_linear_layer_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no plain linear layer"):
        use_onednn(nn.Embedding(3, 4), torch.float32, CPU)
