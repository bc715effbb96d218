"""Whatever steps and schedules torch and transformers have, beside the whole model, to the bit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import SGD, Optimizer, lr_scheduler, swa_utils
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from client_service import SplitModelForCausalLM
from client_service.whole import largest_difference, load_whole, trained_weights
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model

pytestmark = [
    pytest.mark.numeric,
    # Of optimizers and schedules, to whoever calls them as these tests do.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

STEPS = 5
Weights = dict[str, torch.Tensor]
Make = Callable[[Any], tuple[Optimizer, Any]]


class Pair:
    """The split and the whole model with one adapter, set back to the same values for every run."""

    def __init__(self, folder: Path, address: str) -> None:
        config = LoraConfig(
            # Large enough for what keeps small tensors' states in float32.
            task_type="CAUSAL_LM",
            r=32,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
        )
        self.split = SplitModelForCausalLM.from_pretrained(
            folder, address, peft_config=config, seed=1
        )
        torch.manual_seed(1)
        self.whole = get_peft_model(load_whole(folder), config)
        self.fresh = trained_weights(self.whole)
        assert largest_difference(trained_weights(self.split), self.fresh) == 0

    def check(self, make: Make) -> str:
        """Trains both; returns how the whole model refused, or nothing."""
        (ours, said), (theirs, expected) = (self._run(m, make) for m in (self.split, self.whole))
        assert said == expected
        assert largest_difference(ours, theirs) == 0
        assert expected or largest_difference(theirs, self.fresh) > 0
        return expected

    def _run(self, model: Any, make: Make) -> tuple[Weights, str]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.fresh:
                    parameter.copy_(self.fresh[name])
                    parameter.requires_grad_(True).grad = None
        torch.manual_seed(2)
        said = ""
        try:
            train(model.train(), *make(model))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        return trained_weights(model), said


def train(model: Any, optimizer: Optimizer, schedule: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(3, VOCAB, (2, 8), generator=generator)

        def closure(ids: torch.Tensor = ids) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss

        loss = closure()
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(float(loss.detach()))
        elif schedule is not None:
            schedule.step()


@pytest.fixture(scope="module")
def pair(trunkd: Callable[..., Daemon], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = save_tiny_model("gpt2", tmp_path_factory.mktemp("optimizers") / "model", n_layer=3)
    pair = Pair(folder, trunkd("--model", str(folder), "--split", "1:2").address)
    yield pair
    pair.split.remote_trunk.close()


def classes(module: Any, kind: type) -> dict[str, type]:
    return {
        name: found
        for name, found in vars(module).items()
        if inspect.isclass(found) and issubclass(found, kind) and found is not kind
    }


OPTIMIZERS = classes(torch.optim, Optimizer)
REFUSE = {"SparseAdam"}  # gradients that are not sparse


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_s_optimizers(name: str, pair: Pair) -> None:
    settings = {"LBFGS": {"max_iter": 2}}.get(name, {"lr": 1e-2})

    def make(model: Any) -> tuple[Optimizer, Any]:
        trainable = [p for p in model.parameters() if p.requires_grad]
        return OPTIMIZERS[name](trainable, **settings), None

    assert bool(pair.check(make)) == (name in REFUSE)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=STEPS + 1),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.02, anneal_epochs=3),
}


def test_every_schedule_of_torch_is_here() -> None:
    found = classes(lr_scheduler, lr_scheduler.LRScheduler) | classes(
        swa_utils, lr_scheduler.LRScheduler
    )
    assert {made.__name__ for made in found.values()} - {"LRScheduler", "_LRScheduler"} == (
        SCHEDULES.keys()
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_torch_s_schedules(name: str, pair: Pair) -> None:
    def make(model: Any) -> tuple[Optimizer, Any]:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = SGD(trainable, lr=0.1, momentum=0.9)
        return optimizer, SCHEDULES[name](optimizer)

    assert not pair.check(make)


ALWAYS = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
NOT_HERE = r"(Import|Value)Error: .*(need to (have|install)|[Pp]lease install|failed to import) "
"""What the whole model says of libraries that are not installed."""


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_transformers_optimizers(name: str, pair: Pair, tmp_path: Path) -> None:
    def make(model: Any) -> tuple[Optimizer, Any]:
        arguments = TrainingArguments(
            str(tmp_path),
            optim=name,
            optim_target_modules=["c_attn"] if name.startswith(("galore", "apollo")) else None,
            learning_rate=1e-2,
            weight_decay=0.1,
            use_cpu=True,
            report_to=[],
        )
        return Trainer(model, arguments).create_optimizer(), None

    refused = pair.check(make)
    assert not refused or (name not in ALWAYS and re.match(NOT_HERE, refused))
