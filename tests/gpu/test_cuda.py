"""On a CUDA device: the whole model's numbers, the same bits however a forward is held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from client_service import SplitModelForCausalLM
from client_service.whole import largest_difference, trained_weights
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.conftest import Daemon
from tests.integration.test_offload import SMALL, run
from tests.integration.test_pipeline import batch, lora

pytestmark = pytest.mark.gpu

Start = Callable[..., Daemon]
CUDA = ("--device", "cuda")


def steps(model: Any, device: str) -> list[float]:
    """Losses of four AdamW steps."""
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(4):
        rows = {name: tensor.to(device) for name, tensor in batch(step).items()}
        loss = model(**rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("ends", "dtype", "loss_off", "weight_off"),
    [
        ("cuda", torch.float32, 1e-6, 2e-6),
        ("cpu", torch.float32, 2e-5, 5e-5),
        ("cuda", torch.bfloat16, 5e-3, 1e-2),
    ],
)
def test_it_trains_as_the_whole_model_on_the_device(
    ends: str,
    dtype: torch.dtype,
    loss_off: float,
    weight_off: float,
    trunkd: Start,
    tiny_gpt2: Path,
) -> None:
    name = str(dtype).removeprefix("torch.")
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3", *CUDA, "--dtype", name)
    split: Any = SplitModelForCausalLM.from_pretrained(
        tiny_gpt2, daemon.address, peft_config=lora(), seed=0, dtype=dtype, wire_format=name
    )
    torch.manual_seed(0)
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=dtype)
    whole = get_peft_model(whole, lora())
    assert largest_difference(trained_weights(split), trained_weights(whole)) == 0.0
    assert steps(split, ends) == pytest.approx(steps(whole, "cuda"), abs=loss_off)
    found = trained_weights(split)
    for key, tensor in trained_weights(whole).items():
        torch.testing.assert_close(found[key].cpu(), tensor.cpu(), atol=weight_off, rtol=0)
    split.remote_trunk.close()


def test_all_ways_to_hold_give_the_same_bits(
    trunkd: Start, tiny_gpt2: Path, tmp_path: Path
) -> None:
    model = ("--model", str(tiny_gpt2), "--split", "1:9", *CUDA)
    room = ("--offload-bytes", "100000000")
    retained, modes = run(tiny_gpt2, trunkd(*model), 0.2)
    assert modes == {pb.HELD_MODE_RETAINED}
    for flags, mode in (
        (SMALL, pb.HELD_MODE_RECOMPUTED),
        ((*SMALL, *room), pb.HELD_MODE_OFFLOADED),
        ((*SMALL, *room, "--offload-dir", str(tmp_path)), pb.HELD_MODE_OFFLOADED),
    ):
        found, modes = run(tiny_gpt2, trunkd(*model, *flags), 0.2)
        assert modes == {mode}
        for a, b in zip(found, retained, strict=True):
            assert a == b if isinstance(a, float) else torch.equal(a, b)


@pytest.mark.parametrize("batching", [(), ("--batch-decoding", "8")])
def test_it_generates_what_the_whole_model_does(
    batching: tuple[str, ...], trunkd: Start, tiny_gpt2: Path
) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3", *CUDA, *batching)
    split: Any = SplitModelForCausalLM.from_pretrained(tiny_gpt2, daemon.address).to("cuda").eval()
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_gpt2).to("cuda").eval()
    given = {name: batch(0)[name].to("cuda") for name in ("input_ids", "attention_mask")}
    answers = [
        model.generate(**given, max_new_tokens=16, do_sample=False, pad_token_id=0)
        for model in (whole, split)
    ]
    assert torch.equal(*answers)
    split.remote_trunk.close()
