"""``generate()`` through the split, token for token what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from client_service import SplitModelForCausalLM
from shared.errors import ProtocolError
from shared.models import FAMILIES
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model
from trunk_service.budget import ByteBudget
from trunk_service.caches import KeyValueCaches
from trunk_service.requests import CacheEdit

MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 4},
    {"do_sample": True, "temperature": 0.9, "top_k": 50},
    {"do_sample": True, "num_return_sequences": 3},
]
Pair = tuple[Any, Any]


def open_both(family: str, folder: Path, start: Callable[..., Daemon], **changes: Any) -> Pair:
    """The split and the whole model of a family."""
    save_tiny_model(family, folder, pad_token_id=0, **changes)
    daemon = start("--model", str(folder), "--split", "2:4")
    split = SplitModelForCausalLM.from_pretrained(folder, daemon.address)
    return split, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest,
    trunkd: Callable[..., Daemon],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    split, whole = open_both(request.param, tmp_path_factory.mktemp("model") / "model", trunkd)
    yield split, whole
    split.remote_trunk.close()


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams", "sampling", "several"])
def test_generation_equals_the_whole_models(pair: Pair, mode: dict[str, Any]) -> None:
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    found = []
    for model in pair:
        torch.manual_seed(5)
        found.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, **mode)
        )
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {}),
        ("gemma2", {}),
        # No block below the trunk has a window, one of the trunk's two has.
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}),
    ],
)
def test_a_sliding_window_with_guesses_taken_back_and_with_padding(
    family: str, changes: dict[str, Any], trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    both = open_both(family, tmp_path / "model", trunkd, **changes)
    # Repetitive, so that the prompt's own n-grams are guessed; some guesses are wrong.
    ids = torch.tensor([[5, 6, 7, 8, 9] * 4])
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    padded = {"input_ids": torch.cat([ids, ids + 20])}
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][1, :17] = 0
    made = []
    for model in both:
        guessed = model.generate(ids, prompt_lookup_num_tokens=4, **settings)
        # Some of what a mask hides is in the window for a while.
        made.append(
            [model.generate(ids, **settings), guessed, model.generate(**padded, **settings)]
        )
    both[0].remote_trunk.close()
    for ours, theirs in zip(*made, strict=True):
        assert torch.equal(ours, theirs)


def test_a_cache_is_not_cropped_to_tokens_that_have_left_the_window() -> None:
    config = MistralConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1
    )
    config.sliding_window = 5
    caches = KeyValueCaches(config, 4, ByteBudget(1_000_000, "test"))

    def grow(tokens: int, *edits: CacheEdit) -> int:
        cache = caches.open("a", list(edits), 1, tokens)
        new = torch.zeros(1, 1, tokens, 8)
        for layer in range(2):
            cache.update(new, new, layer)
        return int(cache.layers[0].keys.shape[-2])

    def remove(count: int) -> CacheEdit:
        return CacheEdit(remove_tokens=count)

    grow(12)
    assert caches.tokens("a", []) == 12
    assert caches.tokens("a", [remove(3)]) == 9
    assert caches.tokens("a", [remove(12)]) == 0
    with pytest.raises(ProtocolError, match="12 tokens, not 13"):
        caches.tokens("a", [remove(13)])
    with pytest.raises(ProtocolError, match="last 4 of 9"):
        caches.tokens("a", [remove(3), remove(1)])
    assert grow(2, remove(3)) == 6
    assert caches.tokens("a", [remove(2)]) == 9
    with pytest.raises(ProtocolError, match="last 6 of 11"):
        caches.open("a", [remove(3)], 1, 1)
    assert grow(1, CacheEdit(reset=True)) == 1
    assert caches.tokens("a", [remove(1)]) == 0
