"""Adapters side by side: seen as they are trained, within their room, each with its own rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from shared.adapters.numbers import largest_rank
from tests.unit.decoding_streams import LIMITS, WIDTH, Host, Stream, load, lora, numbers
from tests.unit.test_joint_decoding import TOLERANCE, check, difference
from trunk_service.optimizers import OptimizerSpec
from trunk_service.requests import BackwardRequest, ForwardRequest, StepRequest
from trunk_service.session import TenantSession
from trunk_service.trunk import Trunk

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    return load("gpt2", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_a_step_of_a_tenant_is_seen_and_its_weights_stay_its_own(
    gpt2: Trunk, flags: dict[str, bool]
) -> None:
    host = Host(gpt2)
    trained, other = host.open(lora(), 1), host.open(lora(), 2)
    streams = [Stream(trained, seed=1), Stream(other, seed=2)]
    check(host, streams, 2)
    before = streams[0].alone(2)[2]
    hidden = torch.ones(1, 4, WIDTH)
    trained.forward(ForwardRequest(hidden, request_id="r", keep_graph=True, training=True, step=1))
    trained.backward(BackwardRequest(torch.ones(1, 4, WIDTH), "r"))
    trained.step(StepRequest(1, 1.0, OptimizerSpec("sgd", {"lr": 0.1}, flags)))
    assert not torch.allclose(streams[0].alone(2)[2], before)
    late = Stream(host.open(lora(), 3), seed=3)  # PEFT switches what trains when one is added
    check(host, [*streams, late], 2)
    adapter = trained.adapters.get("")
    adapter.restore({n: t * 0.5 for n, t in adapter.weights().items()}, {}, None)
    check(host, streams, 2)
    for session in host.sessions:
        assert all(p.requires_grad for p in session.adapters.get("").parameters)


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
        ranks = sum(largest_rank(a.config) for a in host.decoding._mixed._copies)
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
    overwrite(broken.session, part, value)
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
    overwrite(streams[0].session, "B", float("inf"))
    expected = [s.alone(1)[1] for s in streams[1:]]
    for stream in streams:
        stream.begin()
    first, *others = host.together(*((s.session, s.ask(1, "c")) for s in streams))
    assert not first.joint and all(o.joint for o in others)
    assert not numbers(first.give()).isfinite().all()
    assert max(map(difference, (numbers(o.give()) for o in others), expected)) <= TOLERANCE
    overwrite(streams[0].session, "B", 0.5)
    check(host, streams, 2)


def overwrite(session: TenantSession, part: str, value: float) -> None:
    """What training that diverged may do to an adapter; restoring such numbers is refused."""
    adapter = session.adapters.get("")
    with torch.no_grad():
        for name, parameter in zip(adapter.names, adapter.parameters, strict=True):
            if f"lora_{part}" in name:
                parameter.fill_(value)
    adapter.version += 1


def test_an_adapter_whose_session_has_no_room_for_a_copy_is_computed_alone(gpt2: Trunk) -> None:
    host = Host(gpt2)
    others = [Stream(host.open(lora(), i), seed=i) for i in range(2)]
    copy = sum(p.nbytes for p in others[0].session.adapters.get("").parameters)
    token = 2 * 2 * WIDTH * 4
    room = 2 * 64 * token  # the cache it had alone, and the one it had with others
    for left, joint in ((copy - 1, 2), (copy, 3)):
        limits = replace(LIMITS, session_held_bytes=room + left)
        tight = Stream(host.open(lora(), 7, limits), seed=7)
        check(host, [tight, *others], 2, joint=joint)
        tight.session.close()
