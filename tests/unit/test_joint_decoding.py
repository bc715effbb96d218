"""Tokens of several sessions computed as one, beside each alone: in one process, so every batch is
what the test says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftConfig

from shared.errors import ResourceExhaustedError, TensorError
from shared.models.families import family_of
from shared.wire.formats import WireFormat
from tests.unit.decoding_streams import LIMITS, WIDTH, Host, Stream, load, lora, numbers
from trunk_service.mixed_adapters import MixedAdapters
from trunk_service.requests import CacheEdit
from trunk_service.trunk import Trunk

pytestmark = pytest.mark.numeric

TOLERANCE = 1e-5
"""Of up to 16 tokens of any family: float32's rounding, on every processor."""
LONG_TOLERANCE = {"gpt2": 2e-5, "llama": 1e-4, "qwen2": 1e-4, "gpt_neox": 2e-5}
"""Of 70 tokens, against float64; a token computed alone is no closer to it. At the most, 2.9e-6,
1.6e-5, 3.4e-5 and 1.8e-6 were seen over `make test-cpus`."""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    return load("gpt2", tmp_path_factory.mktemp("model"))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, in parts of the largest number where that is more than 1."""
    return float((found - expected).abs().max() / max(1, expected.abs().max()))


def together(
    host: Host, streams: list[Stream], count: int, joint: int | None = None
) -> list[list[torch.Tensor]]:
    """What every stream is answered, its prompt first; ``joint`` of them are computed as one."""
    found = [[stream.begin()] for stream in streams]
    for number in range(1, count + 1):
        outcomes = host.together(*((s.session, s.ask(number, s.cache_id)) for s in streams))
        assert sum(o.joint for o in outcomes) == (len(streams) if joint is None else joint)
        for answers, outcome in zip(found, outcomes, strict=True):
            answers.append(numbers(outcome.give()))
    return found


def check(host: Host, streams: list[Stream], count: int, joint: int | None = None) -> None:
    """Generates up to 16 tokens together and alone."""
    expected = [stream.alone(count) for stream in streams]
    found = together(host, streams, count, joint)
    for ours, wanted in zip(found, expected, strict=True):
        assert max(map(difference, ours, wanted)) <= TOLERANCE


def various_streams(host: Host) -> list[Stream]:
    """Rows of other lengths, paddings and adapters."""
    layers = list(family_of(host.trunk.info.model_type).linear_layers)
    own = [
        lora(),
        lora(r=2, use_rslora=True, lora_dropout=0.5),
        lora(target_modules=layers, layers_to_transform=[3]),
    ]
    streams = [
        Stream(host.open(config, seed), prompt=5 + 9 * seed, seed=seed)
        for seed, config in enumerate([*own, None])
    ]
    return [*streams, Stream(host.open(lora(), 8), rows=3, prompt=11, padded=4, seed=8)]


@pytest.mark.parametrize("family", LONG_TOLERANCE)
def test_together_and_alone_are_both_rounding_away_from_float64(
    family: str, tmp_path: Path
) -> None:
    exact, host = (
        Host(load(family, tmp_path / str(dtype), dtype)) for dtype in (torch.float64, torch.float32)
    )
    expected = [stream.alone(70) for stream in various_streams(exact)]
    streams = various_streams(host)
    alone = [stream.alone(70) for stream in streams]
    found = together(host, streams, 70)
    for tolerance, count in ((TOLERANCE, 16), (LONG_TOLERANCE[family], 70)):
        for number, stream in itertools.product(range(1, count + 1), range(len(streams))):
            wanted = expected[stream][number]
            assert difference(found[stream][number], wanted) <= tolerance
            assert difference(alone[stream][number], wanted) <= tolerance


def test_what_was_padded_is_never_seen(gpt2: Trunk) -> None:
    """Padding multiplied by nothing is nothing, also beside numbers that are not."""
    host = Host(gpt2)
    long, short = Stream(host.open(), prompt=60, seed=1), Stream(host.open(), prompt=1, seed=2)
    check(host, [long, short], 3)


def test_groups_that_change_equal_each_alone(gpt2: Trunk) -> None:
    host = Host(gpt2)
    streams = [Stream(host.open(lora(), i), prompt=4 + i, seed=i) for i in range(4)]
    expected = [stream.alone(12) for stream in streams]
    for stream in streams:
        stream.begin()
    at = [0] * 4
    for group in ([0, 1], [2, 3], [0, 1], [1, 2, 3], [0], [3, 0], [0, 1, 2, 3], [2, 1, 0]) * 2:
        for which in group:
            at[which] += 1
        outcomes = host.together(*((streams[i].session, streams[i].ask(at[i], "c")) for i in group))
        for which, outcome in zip(group, outcomes, strict=True):
            assert difference(numbers(outcome.give()), expected[which][at[which]]) <= TOLERANCE


def test_edits_of_a_cache_come_before_the_token(gpt2: Trunk) -> None:
    host = Host(gpt2)
    edited = Stream(host.open(lora(), 1), rows=2, padded=0, seed=1)
    edited.edits = {
        3: [CacheEdit(reorder=[1, 0])],
        5: [CacheEdit(remove_tokens=2)],
        6: [CacheEdit(reorder=[0]), CacheEdit(repeats=2)],
    }
    check(host, [edited, Stream(host.open(), prompt=3, seed=2)], 8)


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True, target_modules=["c_attn"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[]),
        lora(target_modules=["c_attn"], bias="lora_only"),
    ],
    ids=["dora", "ia3", "biases"],
)
def test_what_peft_does_not_mix_is_computed_alone(gpt2: Trunk, config: PeftConfig) -> None:
    host = Host(gpt2)
    check(host, [Stream(host.open(config)), Stream(host.open(lora(), 1), seed=1)], 3, joint=0)
    three = [Stream(host.open(c, 1), seed=i) for i, c in enumerate([config, lora(), None])]
    check(host, three, 3, joint=2)


def test_a_window_is_computed_alone(tmp_path: Path) -> None:
    host = Host(load("mistral", tmp_path))
    check(host, [Stream(host.open(), seed=i, prompt=12) for i in range(2)], 3, joint=0)


def test_one_refusal_is_that_requests_own(gpt2: Trunk) -> None:
    host = Host(gpt2)
    streams = [Stream(host.open(), prompt=4 + i, seed=i) for i in range(3)]
    expected = [stream.alone(2) for stream in streams]
    for stream in streams:
        stream.begin()
    asked = [(s.session, s.ask(1, "c")) for s in streams]
    asked[1] = asked[1][0], replace(asked[1][1], attention_mask=torch.ones(1, 99, dtype=torch.bool))
    first, wrong, last = host.together(*asked)
    with pytest.raises(TensorError, match="attention_mask"):
        wrong.give()
    assert difference(numbers(first.give()), expected[0][1]) <= TOLERANCE
    assert difference(numbers(last.give()), expected[2][1]) <= TOLERANCE
    streams[1].tokens -= 1
    again = host.together((streams[1].session, streams[1].ask(1, "c")))
    assert torch.equal(numbers(again[0].give()), expected[1][1])


def test_if_computing_together_fails_each_is_computed_alone(
    gpt2: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(gpt2)
    edits = {2: [CacheEdit(remove_tokens=1)]}
    streams = [Stream(host.open(lora(), i), seed=i, edits=edits) for i in range(3)]
    run = MixedAdapters.run

    def broken(*args: Any, **inputs: Any) -> torch.Tensor:
        run(*args, **inputs)
        raise RuntimeError("broken behind the last block")

    with monkeypatch.context() as patch:
        patch.setattr(MixedAdapters, "run", broken)
        check(host, streams, 3, joint=0)
    check(host, streams, 3)


def test_what_was_reserved_is_given_back(gpt2: Trunk) -> None:
    host = Host(gpt2)
    streams = [Stream(host.open(lora(), i), seed=i, prompt=60) for i in range(3)]
    idle = host.budget.used
    check(host, streams, 10)
    # Of each session the cache it had alone and the one it had with others, with room for 128.
    rooms = 2 * 128 * 2 * 2 * WIDTH * 4
    copy = sum(p.nbytes for p in streams[0].client.parameters.values())
    # And what the client sent, and its copy beside the others'.
    assert streams[0].session.budget.used == rooms + 2 * copy
    assert host.budget.used > 3 * rooms  # the stack is counted too
    for stream in streams:
        stream.session.caches.drop("c")
        stream.session.caches.drop("alone")
    assert host.budget.used == idle + 3 * copy
    for session in host.sessions:
        session.close()
    assert len(host.decoding._mixed) == 0
    assert host.budget.used == 0


def test_without_room_for_a_copy_each_is_computed_alone(gpt2: Trunk) -> None:
    token = 2 * 2 * WIDTH * 4
    host = Host(gpt2, held_bytes=2 * (63 + 64) * token + token)
    check(host, [Stream(host.open(), seed=i, prompt=60) for i in range(2)], 3, joint=0)


def test_a_budget_too_small_for_the_token_refuses_as_alone(gpt2: Trunk) -> None:
    token = 2 * 2 * WIDTH * 4
    host = Host(gpt2)
    tight = Stream(host.open(limits=replace(LIMITS, session_held_bytes=9 * token)), prompt=8)
    others = [Stream(host.open(), seed=i) for i in (1, 2)]
    for stream in (tight, *others):
        stream.begin()
    for number, fits in ((1, True), (2, False)):
        outcomes = host.together(*((s.session, s.ask(number, "c")) for s in (tight, *others)))
        assert [o.joint for o in outcomes] == [False, True, True]
        if fits:
            outcomes[0].give()
        else:
            with pytest.raises(ResourceExhaustedError):
                outcomes[0].give()


def test_an_answer_is_in_the_format_that_was_asked_for(gpt2: Trunk) -> None:
    host = Host(gpt2)
    streams = [Stream(host.open(), seed=i) for i in range(2)]
    for stream in streams:
        stream.begin()
    asked = [
        (s.session, replace(s.ask(1, "c"), answer_format=f))
        for s, f in zip(streams, (WireFormat.BFLOAT16, WireFormat.FLOAT32), strict=True)
    ]
    found = [numbers(outcome.give()).dtype for outcome in host.together(*asked)]
    assert found == [torch.bfloat16, torch.float32]
