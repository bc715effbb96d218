"""How a split model begins and ends: dropped, closed, forked, spawned, and left at the exit."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from client_service import SplitModelForCausalLM, TrainingClient
from shared.errors import InvalidInputError, TrunkUnavailableError
from tests.conftest import Daemon
from tests.patience import PATIENCE_S
from tests.served_here import served_here

Start = Callable[..., Daemon]

IDS = torch.tensor([[5, 9, 30, 7]])
FORKED_S = 5.0
OTHERS = {"tqdm_monitor", "asyncio_0"}
"""Threads of progress bars, and of the trunk that is served in this process."""


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)


@pytest.fixture(scope="module")
def address(tiny_gpt2: Path, trunkd: Start) -> str:
    return trunkd("--model", str(tiny_gpt2)).address


@pytest.fixture
def split(tiny_gpt2: Path, address: str) -> Iterator[Any]:
    model: Any = SplitModelForCausalLM.from_pretrained(tiny_gpt2, address, peft_config=lora())
    yield model
    model.close()


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("collects", [True, False])
def test_a_hundred_models_that_are_dropped_leave_nothing(tiny_gpt2: Path, collects: bool) -> None:
    with served_here(tiny_gpt2, "2:10") as served:
        with SplitModelForCausalLM.from_pretrained(tiny_gpt2, served.address) as first:
            first(input_ids=IDS)
        assert soon(lambda: not list(served.registry.sessions()))
        threads = set(threading.enumerate())  # with those of the trunk, which is here
        if not collects:
            gc.disable()  # until the trunk has no more sessions for this tenant
        try:
            for _ in range(100):  # as a cell of a notebook that is run again
                model: Any = SplitModelForCausalLM.from_pretrained(
                    tiny_gpt2, served.address, peft_config=lora()
                )
                optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
                model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
        finally:
            gc.enable()
        del model, optimizer
        gc.collect()
        assert soon(lambda: not list(served.registry.sessions()))
        assert soon(lambda: {t.name for t in threading.enumerate() if t not in threads} <= OTHERS)


def test_it_is_closed_twice_and_by_with(tiny_gpt2: Path, address: str) -> None:
    with SplitModelForCausalLM.from_pretrained(tiny_gpt2, address) as model:
        model(input_ids=IDS)
    with SplitModelForCausalLM.from_pretrained(
        tiny_gpt2, address, peft_config=lora()
    ).remote_trunk as trunk:
        pass
    with TrainingClient(address) as client:
        client.compute(torch.zeros(1, 2, 64))
    for closed in (model, trunk, client):
        closed.close()
    with pytest.raises(TrunkUnavailableError, match="the session was closed"):
        model(input_ids=IDS)


def _call(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="was forked from the one that opened the session"):
        model(input_ids=IDS)


def _generate(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="was forked from the one that opened the session"):
        model.generate(IDS, max_new_tokens=2)


def _close(model: Any) -> None:
    model.close()


def _open_another(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="forked"):
        TrainingClient(model.remote_trunk.session.address)


@pytest.mark.parametrize("act", [_call, _generate, _close, _open_another])
def test_a_forked_child_answers_or_refuses(split: Any, act: Callable[[Any], None]) -> None:
    loss = split(input_ids=IDS, labels=IDS).loss
    expected = split(input_ids=IDS).logits
    child = os.fork()
    if not child:
        try:
            act(split)
        except BaseException:
            os._exit(1)
        os._exit(0)
    end, status = time.monotonic() + FORKED_S, None
    while status is None and time.monotonic() < end:
        found, code = os.waitpid(child, os.WNOHANG)
        status = code if found else None
        time.sleep(0.01)
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(split(input_ids=IDS).logits, expected)
    loss.backward()


def _spawned(model: Any, found: Any) -> None:
    with torch.no_grad():
        found.put((model.remote_trunk.session.session_id, model(input_ids=IDS).logits.tolist()))
    model.close()


def test_a_spawned_process_has_a_session_of_its_own(split: Any) -> None:
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=_spawned, args=(split, found))
    process.start()
    session, logits = found.get(timeout=60)
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    assert session != split.remote_trunk.session.session_id
    with torch.no_grad():
        expected = split(input_ids=IDS).logits
    assert float((torch.tensor(logits) - expected).abs().max()) <= 1e-5


def test_workers_of_a_data_loader_do_no_harm(split: Any) -> None:
    expected = split(input_ids=IDS).logits
    for batch in DataLoader(list(IDS.repeat(6, 1)), batch_size=2, num_workers=2):
        split(input_ids=batch, labels=batch).loss.backward()
    assert torch.equal(split(input_ids=IDS).logits, expected)


LEFT = """
import sys, torch
from torch.utils.data import DataLoader
from client_service import SplitModelForCausalLM
from peft import LoraConfig
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()
config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
model = SplitModelForCausalLM.from_pretrained(sys.argv[1], sys.argv[2], peft_config=config)
ids = torch.tensor([[5, 9, 30, 7]])
for batch in DataLoader(list(ids.repeat(4, 1)), batch_size=2, num_workers=1):
    loss = model(input_ids=batch, labels=batch).loss
loss.backward()
waiting = model(input_ids=ids, labels=ids).loss
cache = model.generate(ids, max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True)
if sys.argv[3] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 3)])
def test_the_interpreter_ends_without_a_word(
    tiny_gpt2: Path, address: str, how: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LEFT, str(tiny_gpt2), address, how],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert [line for line in done.stderr.splitlines() if "kernels" not in line] == []
