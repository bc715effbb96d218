"""Tokens one at a time: a cache with room gives the bits of transformers' own, and generating
leaves no mark on what is trained afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from shared.errors import ResourceExhaustedError
from shared.models import SplitRange
from shared.models.quantization import QUANTIZATIONS
from tests.models import OF_FAMILY, save_tiny_model
from tests.unit.decoding_streams import LIMITS, WIDTH, Client, Host, Stream, load, lora, numbers
from trunk_service.limits import Limits
from trunk_service.requests import (
    BackwardRequest,
    CacheEdit,
    ForwardRequest,
)
from trunk_service.trunk import Trunk

pytestmark = pytest.mark.numeric


def by_transformers(stream: Stream, count: int) -> list[torch.Tensor]:
    """The same tokens through the client's own model with a ``DynamicCache``."""
    model, outputs = stream.client.model.eval(), list[torch.Tensor]()
    cache = DynamicCache(config=model.config)
    for number in range(count + 1):
        request = stream.ask(number, "")
        for edit in request.cache_edits:
            cache.crop(-(edit.remove_tokens or 0))
        with torch.no_grad():
            output = model(
                inputs_embeds=request.hidden_BTD,
                attention_mask=request.attention_mask,
                position_ids=request.position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        outputs.append(output.last_hidden_state)
    return outputs


OTHERS = [pytest.param(f, marks=pytest.mark.slow) for f in OF_FAMILY if f != "llama"]


@pytest.mark.parametrize("family", ["gpt2", "llama", *OTHERS])
@pytest.mark.parametrize("rows", [1, 3])
def test_bits_are_those_of_a_dynamic_cache(family: str, rows: int, tmp_path: Path) -> None:
    host = Host(load(family, tmp_path))
    stream = Stream(host.open(lora()), rows=rows, prompt=5, padded=2 * (rows > 1))
    stream.edits = {30: [CacheEdit(remove_tokens=2)]}
    if not stream.session.caches.can_pack:
        stream.edits = {}  # what has left a window cannot come back
    expected = by_transformers(stream, 75)  # longer than the room there is at first
    for found, wanted in zip(stream.alone(75), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_mask_that_hides_nothing_is_none(tmp_path: Path) -> None:
    host = Host(load("llama", tmp_path))
    stream = Stream(host.open(lora()))
    expected = stream.alone(5)
    for number, wanted in enumerate(expected):
        asked = stream.ask(number, "without")
        if number:
            asked = ForwardRequest(asked.hidden_BTD, None, asked.position_ids, cache_id="without")
        assert torch.equal(numbers(stream.client.forward(asked)), wanted)


def test_where_there_is_room_for_a_token_and_no_more_it_is_taken(tmp_path: Path) -> None:
    token = 2 * 2 * WIDTH * 4
    host = Host(load("gpt2", tmp_path))
    limits = Limits(**LIMITS.__dict__ | {"session_held_bytes": 9 * token})
    tight, free = (
        Stream(host.open(limits=limits), prompt=8),
        Stream(host.open(), prompt=8),
    )
    assert torch.equal(tight.alone(1)[1], free.alone(1)[1])
    with pytest.raises(ResourceExhaustedError):
        tight.client.forward(tight.ask(2, "alone"))


@pytest.mark.parametrize("left, held", [(71, 9), (72, 64)])
def test_a_cache_is_packed_where_there_is_room_for_both_while_it_is_copied(
    left: int, held: int, tmp_path: Path
) -> None:
    token = 2 * 2 * WIDTH * 4
    limits = Limits(**LIMITS.__dict__ | {"session_held_bytes": left * token})
    stream = Stream(Host(load("gpt2", tmp_path)).open(limits=limits), prompt=8)
    stream.alone(1)
    assert stream.session.budget.used == held * token


def trained(client: Client) -> tuple[torch.Tensor, ...]:
    """Output and gradients of a forward that is kept."""
    generator = torch.Generator().manual_seed(7)
    hidden, gradient = torch.randn(2, 2, 6, WIDTH, generator=generator)
    answer = client.forward(ForwardRequest(hidden, request_id="r", keep_graph=True, training=True))
    names = tuple(client.parameters)
    found = client.session.backward(BackwardRequest(gradient, "r", values=names)).values
    assert found.keys() == set(names)
    return numbers(answer), *found.values()


@pytest.mark.parametrize("kind", ["", *QUANTIZATIONS])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generating_leaves_no_mark_on_training(family: str, kind: str, tmp_path: Path) -> None:
    if kind:
        pytest.importorskip("bitsandbytes")
    folder = save_tiny_model(family, tmp_path)

    def open_session() -> Client:
        # A trunk each: what quantised layers make at first use is shared by all of a trunk.
        cpu = torch.device("cpu")
        return Host(Trunk.load(folder, SplitRange(2, 4), cpu, torch.float32, kind)).open(lora())

    fresh, used = open_session(), open_session()
    Stream(used, rows=2).alone(5)
    used.forward(ForwardRequest(torch.randn(1, 5, WIDTH)))
    for found, wanted in zip(trained(used), trained(fresh), strict=True):
        assert torch.equal(found, wanted)
