"""What a trunk keeps, and what it computes at once, seen from inside of its process."""

from __future__ import annotations

import gc
import itertools
import threading
import uuid
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import client_service.trunk_function
from client_service import TrainingClient
from client_service.calls import ForwardCall, SessionTerms
from client_service.session import TrunkSession
from shared.adapters.state_push import StatePush
from shared.errors import AdapterError
from tests.by_hand import ByHand
from tests.patience import PATIENCE_S
from tests.served_here import served_here
from trunk_service.limits import Limits

HIDDEN = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))


def kept_texts(prefix: str) -> set[str]:
    """Texts behind a prefix that any object of this process refers to."""
    gc.collect()
    found = set()
    for thing in gc.get_objects():
        # A dictionary's keys are no referents of it where all are texts.
        texts = [*gc.get_referents(thing), *(list(thing) if type(thing) is dict else ())]
        found |= {t for t in texts if type(t) is str and t.startswith(prefix)}
    return {text.removeprefix(prefix) for text in found} - {""}


def test_two_thousand_forwards_leave_no_request_id(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, numbers = uuid.uuid4().hex, itertools.count(1)
    named = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"{prefix}{next(numbers)}"))
    monkeypatch.setattr(client_service.trunk_function, "uuid", named)
    with served_here(tiny_gpt2, "1:2") as served, TrainingClient(served.address) as client:
        finalizers = len(weakref.finalize._registry)  # type: ignore[attr-defined]
        for number in range(2000):
            client.forward(HIDDEN, f"{prefix}client's {number}")
            client.backward(HIDDEN)
        (session,) = served.registry.sessions()
        assert len(weakref.finalize._registry) == finalizers  # type: ignore[attr-defined]
        assert len(session.state.held) == session.state.budget.used == 0
        for number in range(3):  # what waits for a backward is found
            client.forward(HIDDEN, f"{prefix}client's {number}")
        assert len(session.state.held) == 3 and len(session.answers) <= 3
        waiting = {"2001", "2002", "2003", "client's 0", "client's 1", "client's 2"}
        assert kept_texts(prefix) == waiting


@pytest.mark.timeout(2 * PATIENCE_S)
def test_two_forwards_with_dropout_are_inside_a_block_at_once(tiny_gpt2: Path) -> None:
    count, meets = 64, threading.Event()
    barrier = threading.Barrier(2)

    def meet(*args: Any) -> None:
        if meets.is_set():
            barrier.wait(PATIENCE_S)

    limits = Limits(tenant_max_sessions=count + 1)  # one more is being closed
    with served_here(tiny_gpt2, "1:2", workers=2, limits=limits) as served:
        for module in served.registry.trunk._part.modules():  # every tenant's tree is a copy
            if isinstance(module, GPT2Block):
                module.mlp.register_forward_hook(meet)
        with TrainingClient(served.address, dropout=0.3) as client:
            client.forward(HIDDEN)
            push = StatePush(1, 0, *client._passage.function._sent.content())
        sessions = [TrunkSession(served.address, SessionTerms()) for _ in range(count)]

        calls = [
            ForwardCall(training=True, dropout_key=bytes([n]) * 32, state_version=1, push=push)
            for n in range(count)
        ]
        pairs = list(zip(sessions, calls, strict=True))

        def outputs() -> list[torch.Tensor]:
            sent = [session.send_forward(HIDDEN, call) for session, call in pairs]
            return [
                session.finish_forward(answer, HIDDEN, call)
                for (session, call), answer in zip(pairs, sent, strict=True)
            ]

        alone = outputs()
        assert not torch.equal(alone[0], alone[1])
        held = replace(calls[0], keep_graph=True, request_id="a")
        assert torch.equal(sessions[0].forward(HIDDEN, held), alone[0])
        meets.set()
        together = outputs()
        assert all(map(torch.equal, together, alone))
        for session in sessions:
            session.close()


def live_bytes() -> int:
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # others have no storage
    tensors = (t for t in gc.get_objects() if type(t) in kinds and t.device.type == "cpu")
    storages = (t.untyped_storage() for t in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_forty_refused_adapters_leave_a_session_as_it_was(tiny_gpt2: Path) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    with served_here(tiny_gpt2, "1:3") as served:
        tenant = ByHand(served.address, config)
        plain = tenant.everything()
        at = next(i for i, v in enumerate(plain.values) if "lora_A" in v.names[0])
        matrix = plain.tensors[at]
        # Refused when it is built, when it is placed, and when it is computed with.
        bad = [tenant.everything(values=plain.values[:at], tensors=plain.tensors[:at])]
        for wrong in (matrix[:-1], matrix.long()):
            tensors = (*plain.tensors[:at], wrong, *plain.tensors[at + 1 :])
            bad.append(tenant.everything(tensors=tensors))
        (session,) = served.registry.sessions()

        def after(rounds: int) -> tuple[int, int, int]:
            for push in bad * rounds:
                with pytest.raises(AdapterError):
                    tenant.push(HIDDEN, push)
            assert torch.equal(tenant.forward(HIDDEN), expected)
            return live_bytes(), session.state.budget.used, session.owner._parameters

        expected = tenant.forward(HIDDEN)
        before, found = after(1), after(14)
        assert found[1:] == before[1:] and found[0] - before[0] < matrix.nbytes
        tenant.close()
