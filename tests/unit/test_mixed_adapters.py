"""Adapters side by side: seen as they are trained, within their room, each with its own rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.unit.decoding_streams import LIMITS, WIDTH, Client, Host, Stream, load, lora, numbers
from tests.unit.test_joint_decoding import TOLERANCE, check, difference
from trunk_service.requests import ForwardRequest
from trunk_service.trunk import Trunk

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    return load("gpt2", tmp_path_factory.mktemp("model"))


def test_what_a_tenant_has_trained_is_seen_and_stays_its_own(gpt2: Trunk) -> None:
    host = Host(gpt2)
    trained, other = host.open(lora(), 1), host.open(lora(), 2)
    streams = [Stream(trained, seed=1), Stream(other, seed=2)]
    check(host, streams, 2)
    before = streams[0].alone(2)[2]
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.sub_(0.1 * parameter)
    assert not torch.allclose(streams[0].alone(2)[2], before)
    check(host, [*streams, Stream(host.open(lora(), 3), seed=3)], 2)
    for module in trained.model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    check(host, streams, 2)
    assert len(host.decoding._mixed) == 2


def test_adapters_that_are_too_many_make_place_for_others(
    gpt2: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunk_service.mixed_adapters._MOST_RANKS", 17)
    host = Host(gpt2)
    changes: list[dict[str, Any]] = [
        {"r": 2},
        {"r": 6, "lora_alpha": 1},
        {"target_modules": ["c_fc"]},
        {"r": 3, "rank_pattern": {"c_attn": 5}, "alpha_pattern": {"c_fc": 3}},
        {"use_rslora": True},
    ]
    streams = [Stream(host.open(lora(**c), i), seed=i) for i, c in enumerate(changes)]
    frozen = Stream(host.open(), seed=9)
    for group in (streams[:3], [*streams[2:], frozen], streams[:2], [streams[4], frozen]):
        check(host, group, 2)
        copies = host.decoding._mixed._copies.values()
        ranks = sum(max(len(m.a_RK) for m in copy.lora.values()) for copy in copies)
        assert 0 < ranks <= 17
    wide = Stream(host.open(lora(r=18), 7), seed=7)
    check(host, [wide, *streams[:2]], 2, joint=2)


def test_an_adapter_without_rows_makes_place_after_a_while(
    gpt2: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trunk_service.mixed_adapters._IDLE_FORWARDS", 4)
    host = Host(gpt2)
    streams = [Stream(host.open(lora(), i), seed=i) for i in range(3)]
    check(host, streams, 2)
    assert len(host.decoding._mixed) == 3
    check(host, streams[:2], 6)
    assert len(host.decoding._mixed) == 2


@pytest.mark.parametrize(("part", "value"), [("A", float("nan")), ("A", 1e38), ("B", 1e38)])
def test_numbers_that_are_none_stay_with_their_tenant(gpt2: Trunk, part: str, value: float) -> None:
    host = Host(gpt2)
    broken, *healthy = (Stream(host.open(lora(), i), seed=i) for i in range(3))
    frozen = Stream(host.open(), seed=9)
    check(host, [broken, *healthy, frozen], 2)
    overwrite(broken.client, part, value)
    expected = {id(s): s.alone(3) for s in (*healthy, frozen)}
    everyone = [broken, *healthy, frozen]
    for stream in everyone:
        stream.begin()
    for number in range(1, 4):
        outcomes = host.together(*((s.session, s.ask(number, "c")) for s in everyone))
        for stream, outcome in list(zip(everyone, outcomes, strict=True))[1:]:
            assert outcome.joint
            wanted = expected[id(stream)][number]
            assert difference(numbers(outcome.give()), wanted) <= TOLERANCE


def test_an_adapter_that_would_spoil_others_zeros_is_computed_alone(gpt2: Trunk) -> None:
    host = Host(gpt2)
    streams = [Stream(host.open(lora(), i), seed=i) for i in range(3)]
    check(host, streams, 2)
    overwrite(streams[0].client, "B", float("inf"))
    expected = [s.alone(1)[1] for s in streams[1:]]
    for stream in streams:
        stream.begin()
    first, *others = host.together(*((s.session, s.ask(1, "c")) for s in streams))
    assert not first.joint and all(o.joint for o in others)
    assert not numbers(first.give()).isfinite().all()
    assert max(map(difference, (numbers(o.give()) for o in others), expected)) <= TOLERANCE
    overwrite(streams[0].client, "B", 0.5)
    check(host, streams, 2)


def overwrite(client: Client, part: str, value: float) -> None:
    """What training that diverged may do to an adapter."""
    with torch.no_grad():
        for name, parameter in client.parameters.items():
            if f"lora_{part}" in name:
                parameter.fill_(value)
    client.forward(ForwardRequest(torch.zeros(1, 1, WIDTH)))


def test_an_adapter_whose_session_has_no_room_for_a_copy_is_computed_alone(gpt2: Trunk) -> None:
    host = Host(gpt2)
    others = [Stream(host.open(lora(), i), seed=i) for i in range(2)]
    copy = sum(p.nbytes for p in others[0].client.parameters.values())
    token = 2 * 2 * WIDTH * 4
    room = 2 * 64 * token  # the cache it had alone, and the one it had with others
    for left, joint in ((2 * copy - 1, 2), (2 * copy, 3)):
        limits = replace(LIMITS, session_held_bytes=room + left)
        tight = Stream(host.open(lora(), 7, limits), seed=7)
        check(host, [tight, *others], 2, joint=joint)
        tight.session.close()
