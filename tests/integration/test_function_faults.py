"""Every message delivered twice, every answer lost once: the bits of an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from client_service.calls import SessionTerms
from client_service.dropout_key import SECRET_VARIABLE
from client_service.session import TrunkSession
from client_service.skeleton_model import with_skeleton
from shared.models import SplitRange, open_checkpoint
from tests.conftest import Daemon
from tests.models import VOCAB
from tests.proxy import Line, line_to

pytestmark = pytest.mark.filterwarnings("ignore:`loss_type=None`")


@pytest.fixture(params=[{"twice": True}, {"loses": True}], ids=["twice", "lost"])
def line(
    request: pytest.FixtureRequest, trunkd: Callable[..., Daemon], tiny_gpt2: Path
) -> Iterator[Line]:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    with line_to(daemon.address, **request.param) as opened:
        yield opened


@pytest.fixture
def run(
    trunkd: Callable[..., Daemon],
    tiny_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Line | None, Callable[[Any], Any]], Any]:
    """Does something with a split model, over a line or without."""
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "dropout_secret"))
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")

    def over(line: Line | None, work: Callable[[Any], Any]) -> Any:
        address = line.address if line else daemon.address
        with closing(TrunkSession(address, SessionTerms())) as session:
            checkpoint = open_checkpoint(tiny_gpt2)
            model = with_skeleton(checkpoint, SplitRange(1, 3), session, torch.float32)
            torch.manual_seed(5)
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=4,
                lora_dropout=0.2,
                target_modules=["c_attn", "c_proj"],
                fan_in_fan_out=True,
            )
            found = work(get_peft_model(model, config))
            if line is not None and line.loses:
                assert session.recoveries >= len(line.lost) > 3
            return found

    return over


def trained(model: Any) -> list[torch.Tensor]:
    """Three steps of two micro-batches, both graphs held at once."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, VOCAB, (2, 2, 12), generator=generator)
        losses = [model(input_ids=micro, labels=micro).loss for micro in ids]
        for loss in losses:
            loss.backward()
        found += [loss.detach() for loss in losses]
        found += [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return found + [p.detach().clone() for p in parameters]


def generated(model: Any) -> list[torch.Tensor]:
    """With a cache: greedy, beams, sampled; and a cache that goes on after the adapter moved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.eval()
    prompt = {"input_ids": torch.tensor([[5, 9, 30, 7]]), "pad_token_id": 0, "max_new_tokens": 8}
    found = [
        model.generate(**prompt, do_sample=False),
        model.generate(**prompt, num_beams=4),
        model.generate(**prompt, do_sample=True),
    ]
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[5, 9, 30]])).past_key_values
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        for token in (3, 4, 5):
            answer = model(input_ids=torch.tensor([[token]]), past_key_values=cache)
            found.append(answer.logits)
    return found


@pytest.mark.parametrize("work", [trained, generated])
def test_a_faulty_line_changes_no_bit(
    line: Line, run: Callable[..., Any], work: Callable[[Any], Any]
) -> None:
    expected, found = run(None, work), run(line, work)
    assert len(found) == len(expected) > 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert line.doubled > 8 or len(line.lost) > 8
