"""Messages delivered twice, answers lost, a trunk killed: the bits of an undisturbed run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
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
from tests.conftest import Daemon, start_daemon
from tests.models import VOCAB
from tests.patience import PATIENCE_S
from tests.proxy import Line, line_to
from tests.ways_of_calling import WAYS

pytestmark = pytest.mark.filterwarnings("ignore:`loss_type=None`")

Work = Callable[[Any], list[torch.Tensor]]
Found = tuple[list[torch.Tensor], int]


@pytest.fixture(params=[{"twice": True}, {"loses": True}], ids=["twice", "lost"])
def line(
    request: pytest.FixtureRequest, trunkd: Callable[..., Daemon], tiny_gpt2: Path
) -> Iterator[Line]:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    with line_to(daemon.address, **request.param) as opened:
        yield opened


@pytest.fixture
def calm(trunkd: Callable[..., Daemon], tiny_gpt2: Path) -> str:
    """The address of a trunk without faults."""
    return trunkd("--model", str(tiny_gpt2), "--split", "1:3").address


@pytest.fixture
def run(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Work], Found]:
    """Does something with a split model; returns what it found, and how often it recovered."""
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "dropout_secret"))

    def over(address: str, work: Work) -> Found:
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
            return work(get_peft_model(model, config)), session.recoveries

    return over


def trained(model: Any) -> list[torch.Tensor]:
    """Three steps of four micro-batches, all graphs held at once."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, VOCAB, (4, 2, 12), generator=generator)
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
    found = [
        *completed(model, do_sample=False),
        *completed(model, num_beams=4),
        *completed(model, do_sample=True),
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


def completed(model: Any, **settings: Any) -> list[torch.Tensor]:
    """What an adapter that does something generates, and the scores of its tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    answer = model.eval().generate(
        input_ids=torch.tensor([[5, 9, 30, 7]]),
        pad_token_id=0,
        max_new_tokens=8,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    return [answer.sequences, *answer.scores]


def called(model: Any, way: str) -> list[torch.Tensor]:
    """One of the ways of calling a model."""
    return [WAYS[way](model.eval())]


CALLED = [
    ("static_cache_by_generate", 5),
    ("static_cache_by_hand_with_padding", 2),
    ("static_prompt_cache", 3),
    ("prompt_cache", 1),
    ("prompt_cache", 6),
    ("copied_cache_outlives_the_original", 2),
    ("cache_cropped_repeated_selected_reset", 3),
    ("a_cache_goes_on_after_generate", 9),
    ("prompt_lookup", 2),
    ("chunked_prefill", 2),
    ("guidance", 7),
    ("hidden_states_of_generate", 3),
    ("gradients_of_hidden_states", 1),
    ("adapter_written_between_tokens", 3),
    ("cache_filled_with_gradients_goes_on", 2),
]
"""Ways, and behind which forward their trunk is killed."""


@pytest.mark.parametrize("work", [trained, generated])
def test_a_faulty_line_changes_no_bit(line: Line, calm: str, run: Any, work: Work) -> None:
    (expected, _), (found, recoveries) = run(calm, work), run(line.address, work)
    assert len(found) == len(expected) > 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert line.doubled > 8 or len(line.lost) > 8
    assert recoveries >= len(line.lost) - 1  # the session's end is not asked for again


@pytest.mark.parametrize(
    ("work", "at"),
    [
        pytest.param(trained, 8, id="four graphs held"),
        pytest.param(partial(completed, do_sample=False), 4, id="greedy"),
        pytest.param(partial(completed, num_beams=4), 4, id="four beams"),
        *(pytest.param(partial(called, way=way), at, id=f"{way}-{at}") for way, at in CALLED),
    ],
)
def test_a_trunk_killed_in_the_middle_changes_no_bit(
    work: Work, at: int, calm: str, run: Any, tiny_gpt2: Path, tmp_path: Path
) -> None:
    doomed = start_daemon(tmp_path, "--model", str(tiny_gpt2), "--split", "1:3")
    forwards = itertools.count(1)

    def kill(*_: Any) -> None:
        if next(forwards) == at:
            doomed.process.kill()
            doomed.process.wait(PATIENCE_S)

    def disturbed(model: Any) -> list[torch.Tensor]:
        model.get_output_embeddings().register_forward_hook(kill)
        return work(model)

    (expected, _), (found, recoveries) = run(calm, work), run(f"{doomed.address},{calm}", disturbed)
    assert recoveries == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
