"""``generate()`` of several clients at once on a trunk that computes their tokens as one batch."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig

from client_service import SplitModelForCausalLM
from shared.errors import TensorError
from tests.by_hand import ByHand
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model
from tests.patience import PATIENCE_S

NEW, WIDTH = 32, 64
# One configuration for all families.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
FLAGS = ("--split", "2:4", "--batch-decoding", "8", "--metrics", "127.0.0.1:0")


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "qwen2")]


@pytest.fixture(scope="module", params=["gpt2", *SLOW])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("model") / "model"
    return save_tiny_model(request.param, model, pad_token_id=0)


@pytest.fixture
def daemon(folder: Path, trunkd: Callable[..., Daemon]) -> Daemon:
    return trunkd("--model", str(folder), *FLAGS)


@pytest.fixture
def models() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def open_model(
    stack: ExitStack, folder: Path, daemon: Daemon, config: PeftConfig | None, seed: int
) -> Any:
    model = SplitModelForCausalLM.from_pretrained(
        folder, daemon.address, peft_config=config, seed=seed
    )
    stack.enter_context(closing(model.remote_trunk))
    return model.eval()


def lora(**changes: Any) -> LoraConfig:
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def batched_rows(daemon: Daemon) -> float:
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    address = next(line["address"] for line in lines if line["message"] == "metrics")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    found = re.findall(r"^trunkline_batched_rows_total\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def prompt(seed: int, rows: int, tokens: int, padded: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def at_once(work: list[Callable[[], Any]]) -> list[Any]:
    """Runs all on threads that start together."""
    start = threading.Barrier(len(work))

    def begin(one: Callable[[], Any]) -> Any:
        start.wait(PATIENCE_S)
        return one()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(begin, one) for one in work]]


def until_some_meet(daemon: Daemon, once: Callable[[], list[Any]], rows: int = 1) -> list[Any]:
    """What was computed, again and again, until so many rows were computed with others'.

    Who meets whom is a matter of timing; tests/unit/test_joint_decoding.py has every batch as it
    says.
    """
    before, found = batched_rows(daemon), list[Any]()
    while batched_rows(daemon) - before < rows:
        found.append(once())
    return found


def test_tokens_are_those_of_each_alone(folder: Path, daemon: Daemon, models: ExitStack) -> None:
    clients = [
        (lora(), prompt(1, 1, 5), {}),
        (lora(r=2, use_rslora=True), prompt(2, 1, 23), {}),
        (None, prompt(3, 3, 12, padded=6), {}),
        (lora(), prompt(4, 1, 9), {"num_beams": 3}),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), prompt(5, 1, 7), {}),
    ]
    work = list[Callable[[], torch.Tensor]]()
    for seed, (config, inputs, mode) in enumerate(clients):
        model = open_model(models, folder, daemon, config, seed)
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | mode
        work.append(lambda m=model, i=inputs, s=settings: m.generate(**i, **s))
    alone = [one() for one in work]
    for together in until_some_meet(daemon, lambda: at_once(work)):
        for found, expected in zip(together, alone, strict=True):
            assert torch.equal(found, expected)


class Client:
    """A client that only sends hidden states."""

    def __init__(self, daemon: Daemon, seed: int, config: PeftConfig | None) -> None:
        self._tenant, self._seed = ByHand(daemon.address, config, seed), seed
        self.session = self._tenant.session

    def run(self, cache_id: str, wrong_at: int = -1) -> list[torch.Tensor]:
        """A prompt and its tokens; before one of them, the same with a mask that does not fit."""
        generator = torch.Generator().manual_seed(self._seed)
        answers, total = list[torch.Tensor](), 0
        for number in range(NEW):
            new = 1 if number else 3 + 5 * self._seed
            total += new
            hidden = torch.randn(1, new, WIDTH, generator=generator)
            mask = torch.ones(1, total, dtype=torch.bool)
            mask[:, : self._seed] = False
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
            if number == wrong_at:
                wrong = {"attention_mask": mask[:, 1:], "position_ids": positions}
                with pytest.raises(TensorError, match="attention_mask"):
                    self._tenant.forward(hidden, cache_id=cache_id, **wrong)
            right = {"attention_mask": mask, "position_ids": positions}
            answers.append(self._tenant.forward(hidden, cache_id=cache_id, **right))
        return answers


def test_hidden_states_are_those_of_each_alone_whoever_else_is_refused(
    daemon: Daemon, models: ExitStack
) -> None:
    clients = [Client(daemon, seed, lora() if seed % 2 else None) for seed in range(4)]
    for client in clients:
        models.enter_context(closing(client.session))
    alone = [client.run("alone") for client in clients]

    def once() -> list[Any]:
        name = uuid.uuid4().hex
        return at_once(
            [lambda c=c, n=n: c.run(name, wrong_at=5 * n + 1) for n, c in enumerate(clients)]
        )

    for together in until_some_meet(daemon, once, NEW):
        for one, other in zip(chain(*together), chain(*alone), strict=True):
            assert (one - other).abs().max() <= 1e-5 * max(1, other.abs().max())


def test_a_tenant_that_trains_beside_generates_with_its_new_weights(
    folder: Path, daemon: Daemon, models: ExitStack
) -> None:
    trained, other = (open_model(models, folder, daemon, lora(), seed) for seed in (1, 2))
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    crowd = [Client(daemon, seed, None) for seed in range(4)]  # so that there is whom to join
    for client in crowd:
        models.enter_context(closing(client.session))

    def both() -> list[torch.Tensor]:
        inputs = [(trained, prompt(1, 1, 6)), (other, prompt(2, 1, 9))]
        work = [lambda m=m, i=i: m.generate(**i, **settings) for m, i in inputs]
        return at_once([*work, *(lambda c=c: c.run(uuid.uuid4().hex) for c in crowd)])[:2]

    first = both()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.05)
    ids = prompt(3, 2, 12)["input_ids"]
    trained.train()
    trained(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    trained.eval()
    alone = trained.generate(**prompt(1, 1, 6), **settings)
    for second in until_some_meet(daemon, both):
        assert torch.equal(second[1], first[1])
        assert not torch.equal(second[0], first[0])
        assert torch.equal(second[0], alone)


def test_without_the_flag_nothing_is_computed_together(
    trunkd: Callable[..., Daemon], tmp_path: Path, models: ExitStack
) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model")
    daemon = trunkd("--model", str(model), "--split", "2:4", "--metrics", "127.0.0.1:0")
    clients = [Client(daemon, seed, None) for seed in range(3)]
    for client in clients:
        models.enter_context(closing(client.session))
    alone = [client.run("alone") for client in clients]
    together = at_once([lambda c=c: c.run("together") for c in clients])
    assert batched_rows(daemon) == 0
    for found, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, found, expected))
