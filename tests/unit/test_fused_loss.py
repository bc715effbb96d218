"""The fused loss against transformers' own, on whole models: loss, gradients, fallbacks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from client_service import fused_loss
from client_service.fused_loss import fused_linear_cross_entropy
from client_service.skeleton_model import _split_class
from shared.errors import InvalidInputError
from tests.models import OF_FAMILY, VOCAB, tiny_model

pytestmark = pytest.mark.numeric


def fused(family: str) -> tuple[Any, Any]:
    """The tiny model as a client's class makes it, but whole; and the family's own."""
    plain = tiny_model(family)
    model = _split_class(type(plain), True)(plain.config)
    model.load_state_dict(plain.state_dict())
    model.tie_weights()
    for made in (plain, model):
        made.loss_type = "ForCausalLM"
    return model.train(), plain.train()


def batch(ignored: float = 0.4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 20), generator=generator)
    drop = torch.rand(ids.shape, generator=generator) < ignored
    return {"input_ids": ids, "labels": ids.masked_fill(drop, -100)}


def assert_same_training(ours: Any, theirs: Any, **inputs: Any) -> None:
    """Two accumulated micro-batches, the second scaled: losses and every gradient."""
    for model in (ours, theirs):
        model.zero_grad()
    for scale in (1.0, 0.5):
        mine, other = (m(**inputs, use_cache=False).loss for m in (ours, theirs))
        assert mine.dtype == other.dtype == torch.float32
        assert abs(float((mine - other).detach())) <= 1e-5
        (mine * scale).backward()
        (other * scale).backward()
    found = dict(ours.named_parameters())
    expected = {n: p for n, p in theirs.named_parameters() if p.grad is not None}
    assert expected and expected.keys() == {n for n, p in found.items() if p.grad is not None}
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def both(
    hidden: torch.Tensor, head: nn.Linear, labels: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradients (the input's, and the head's if it is trained), ours beside torch's."""
    found: list[list[torch.Tensor]] = []
    for loss_of in (fused_linear_cross_entropy, lambda h, m, t: cross_entropy(m(h), t)):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        loss = loss_of(leaf, head, labels)
        loss.backward()
        grads = [p.grad for p in (leaf, *head.parameters()) if p.grad is not None]
        found.append([loss.detach(), *grads])
    expected = 2 + sum(p.requires_grad for p in head.parameters())
    assert [len(values) for values in found] == [expected, expected]
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("family", ["gpt2", *OF_FAMILY])
def test_every_family_trains_as_with_its_own_loss(family: str) -> None:
    ours, theirs = fused(family)
    assert_same_training(ours, theirs, **batch())
    changes_logits = family == "gemma2"
    assert (ours(**batch(), use_cache=False).logits is None) != changes_logits


@pytest.mark.parametrize("num_items", [7, torch.tensor(50)], ids=["int", "tensor"])
def test_the_sum_is_divided_by_the_items_of_the_whole_batch(num_items: Any) -> None:
    ours, theirs = fused("gpt2")
    assert_same_training(ours, theirs, **batch(), num_items_in_batch=num_items)


def test_shifted_labels_are_taken_as_they_are() -> None:
    ours, theirs = fused("llama")
    inputs = batch()
    shifted = inputs["labels"].roll(3, dims=1)
    assert_same_training(ours, theirs, **inputs, shift_labels=shifted)


def test_only_positions_that_count_reach_the_head() -> None:
    ours, _ = fused("gpt2")
    inputs = batch(0.0)
    inputs["labels"][:, 5:] = -100
    seen: list[int] = []
    made = fused_loss._logits

    def counted(hidden_CD: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(hidden_CD))
        return made(hidden_CD, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_loss, "_logits", counted)
        patch.setattr(fused_loss, "CHUNK_ROWS", 5)
        ours(**inputs, use_cache=False)
    assert seen == [4, 4, 4]  # of 3 sequences with 4 predicted labels each; evenly, at most 5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("count", [1, 256, 257, 700])
@pytest.mark.parametrize("block", [99, 1000])
def test_chunks_and_blocks_add_up(
    block: int, count: int, trained: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "CHUNK_ROWS", 256)
    monkeypatch.setattr(fused_loss, "VOCABULARY_BLOCK", block)
    torch.manual_seed(0)
    # Logits as far apart as a sharp model's, so that probabilities underflow.
    hidden = torch.randn(count, 32) * 20
    head = nn.Linear(32, 1000, bias=bias).requires_grad_(trained)
    labels = torch.randint(1000, (count,))
    for mine, other in both(hidden, head, labels):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("trained", [False, True])
def test_words_that_a_bias_rules_out_have_no_part(
    trained: bool, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole block of them too, which has no largest logit."""
    monkeypatch.setattr(fused_loss, "VOCABULARY_BLOCK", 10)
    hidden = torch.randn(7, 8)
    head = nn.Linear(8, 30).requires_grad_(trained)
    out = slice(0, 12) if first else slice(18, 30)
    with torch.no_grad():
        head.bias[out] = -math.inf
    labels = torch.randint(12, 18, (7,))
    for mine, other in both(hidden, head, labels):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("label", [-1, 30])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    head = nn.Linear(8, 30)
    with pytest.raises(InvalidInputError, match=f"label {label}: accepted are 0 to 29, and -100"):
        fused_linear_cross_entropy(torch.randn(2, 8), head, torch.tensor([3, label]))


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest result of any operation has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_no_more_logits_are_made_than_those_of_a_chunk_and_a_block() -> None:
    hidden = torch.randn(2000, 16, requires_grad=True)
    head = nn.Linear(16, 50_000, bias=False).requires_grad_(False)
    with Largest() as largest:
        fused_linear_cross_entropy(hidden, head, torch.randint(50_000, (2000,))).backward()
    assert largest.numbers == 500 * fused_loss.VOCABULARY_BLOCK  # four chunks of 500


def test_a_bfloat16_head_adds_its_chunks_up_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2000, 32, dtype=torch.bfloat16)
    head = nn.Linear(32, 100).bfloat16()
    labels = torch.randint(100, (2000,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_loss, "CHUNK_ROWS", 10)
        loss = fused_linear_cross_entropy(hidden.requires_grad_(), head, labels)
    loss.backward()
    exact = nn.Linear(32, 100)
    exact.load_state_dict(head.state_dict())
    cross_entropy(exact(hidden.detach().float()), labels).backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.bfloat16
    difference = (head.weight.grad.float() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert difference < 0.01  # 200 sums in bfloat16 would be off by more
    assert loss.dtype == torch.float32 and hidden.grad is not None


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_sure_tokens_are_not_rounded_away(
    dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of probability 0.999: what is left is small beside the label's row."""
    monkeypatch.setattr(fused_loss, "VOCABULARY_BLOCK", 300)
    torch.manual_seed(0)
    labels = torch.randint(1000, (64,))
    head = nn.Linear(256, 1000, bias=False).requires_grad_(trained)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1000, 256) + 0.5)  # with a mean, as embeddings have
        rows = head.weight[labels] - 0.5
        hidden = rows * ((math.log(999) + math.log(1000)) / rows.square().sum(1))[:, None]
    exact = nn.Linear(256, 1000, bias=False, dtype=torch.float64).requires_grad_(trained)
    head, hidden = head.to(dtype), hidden.to(dtype)
    exact.weight.data.copy_(head.weight)
    found = []
    for loss_of, of in ((fused_linear_cross_entropy, head), (None, exact)):
        leaf = hidden.detach().to(of.weight.dtype, copy=True).requires_grad_()
        loss = loss_of(leaf, of, labels) if loss_of else cross_entropy(of(leaf), labels)
        loss.backward()
        found.append([g.double() for g in (leaf.grad, of.weight.grad) if g is not None])
    assert 0 < float(loss.detach()) < 0.05
    bound = 0.1 if dtype == torch.bfloat16 else 1e-2
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() / other.norm() < bound


def test_a_retained_graph_gives_its_gradient_again() -> None:
    hidden = torch.randn(6, 8, requires_grad=True)
    head = nn.Linear(8, 30)
    loss = fused_linear_cross_entropy(hidden, head, torch.randint(30, (6,)))
    loss.backward(retain_graph=True)
    assert hidden.grad is not None and head.weight.grad is not None
    once = hidden.grad.clone(), head.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once[0])
    torch.testing.assert_close(head.weight.grad, 2 * once[1])


def test_a_batch_without_labels_has_no_gradient() -> None:
    ours, theirs = fused("gpt2")
    inputs = batch()
    inputs["labels"].fill_(-100)
    for model in (ours, theirs):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        assert math.isnan(float(loss.detach()))
        assert all(not p.grad.any() for p in model.parameters())
    assert float(ours(**inputs, use_cache=False, num_items_in_batch=3).loss.detach()) == 0.0


def test_other_outputs_stay() -> None:
    ours, theirs = fused("gpt2")
    asked = {"output_hidden_states": True, "use_cache": True}
    mine, other = (m(**batch(), **asked) for m in (ours, theirs))
    assert len(mine.hidden_states) == len(other.hidden_states)
    assert torch.equal(mine.hidden_states[-1], other.hidden_states[-1])
    assert mine.past_key_values.get_seq_length() == 20
    as_tuple = ours(**batch(), use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], mine.loss)


def test_gradient_checkpointing_changes_nothing() -> None:
    ours, theirs = fused("llama")
    ours.activation_checkpointing_enable()
    assert_same_training(ours, theirs, **batch())


def _evaluation(model: Any) -> dict[str, Any]:
    model.eval()
    return {}


def _capped(model: Any) -> dict[str, Any]:
    model.config.logit_scale = 0.5
    return {}


def _hooked(model: Any) -> dict[str, Any]:
    model.lm_head.register_forward_hook(lambda module, given, made: made)
    return {}


def _other_head(model: Any) -> dict[str, Any]:
    class Noted(nn.Linear):
        pass

    model.lm_head.__class__ = Noted
    return {}


def _own_loss(model: Any) -> dict[str, Any]:
    model.loss_function = lambda *args, **kwargs: ForCausalLMLoss(*args, **kwargs)
    return {}


def _wrapped_head(model: Any) -> dict[str, Any]:
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    return {}


@pytest.mark.parametrize(
    "change",
    [_evaluation, _capped, _hooked, _other_head, _own_loss, _wrapped_head],
    ids=lambda change: change.__name__,
)
def test_whatever_is_not_a_plain_head_has_the_ordinary_loss(change: Any) -> None:
    ours, theirs = fused("llama")
    change(ours)
    theirs.train(ours.training)
    mine, other = (m(**batch(), use_cache=False) for m in (ours, theirs))
    torch.testing.assert_close(mine.logits, other.logits)
    torch.testing.assert_close(mine.loss, other.loss)


def test_without_labels_or_with_chosen_logits_it_is_the_family_s_forward() -> None:
    ours, _ = fused("gpt2")
    inputs = batch()
    assert ours(inputs["input_ids"]).logits.shape == (3, 20, VOCAB)
    last = {"input_ids": inputs["input_ids"], "labels": inputs["labels"][:, -2:]}
    assert ours(**last, logits_to_keep=2).logits.shape == (3, 2, VOCAB)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(**inputs).logits is not None
    assert ours(inputs["input_ids"], labels=inputs["labels"]).logits is None
