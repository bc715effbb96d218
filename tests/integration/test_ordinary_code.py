"""What libraries and training loops do to a model, done to the split one and to the whole one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from client_service import SplitModelForCausalLM
from client_service.whole import largest_difference, load_whole, trained_weights
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model

accelerate = pytest.importorskip("accelerate")
references = pytest.importorskip("trl.experimental.utils")


@dataclass
class Pair:
    """Opens the split model and the whole one."""

    folder: Path
    address: str
    opened: list[Any] = field(default_factory=list)

    def bare(self) -> list[Any]:
        split = SplitModelForCausalLM.from_pretrained(self.folder, self.address)
        self.opened.append(split)
        return [split, load_whole(self.folder)]

    def adapted(self) -> list[Any]:
        return [adapted(model) for model in self.bare()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("ordinary") / "model", n_layer=4)


@pytest.fixture
def pair(trunkd: Callable[..., Daemon], folder: Path) -> Iterator[Pair]:
    pair = Pair(folder, trunkd("--model", str(folder), "--split", "1:3").address)
    yield pair
    for model in pair.opened:
        model.remote_trunk.close()


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    return LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings | changes)


def adapted(model: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, lora(**changes)).train()


def batches(count: int, seed: int = 3) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randint(3, VOCAB, (2, 12), generator=generator)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def trained(model: Any, optimizer: Any = None, steps: int = 3, seed: int = 3) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for ids in batches(steps, seed):
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=next(batches(1, 8))).logits
    return found


def in_the_trunk(model: Any) -> torch.nn.Parameter:
    return next(p for n, p in model.named_parameters() if ".h.1." in n and "lora_B" in n)


def lora_plus(model: Any) -> Any:
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    assert len({group["lr"] for group in optimizer.param_groups}) > 1
    return trained(model, optimizer)


def scaled_losses(model: Any, **settings: Any) -> Any:
    """Steps are skipped where gradients overflow by themselves, and where one is made to."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-64)
    found = []
    for number, ids in enumerate(batches(5)):
        before = in_the_trunk(model).detach().clone()
        scaler.scale(1e3 * loss_of(model, ids)).backward()
        if number == 2:
            gradient = in_the_trunk(model).grad
            assert gradient is not None
            gradient[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable(model), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append((scaler.get_scale(), torch.equal(in_the_trunk(model), before)))
    assert [skipped for _, skipped in found] == [True, False, True, False, False]
    return found


def scaled_losses_by_a_fused_step(model: Any) -> Any:
    return scaled_losses(model, fused=True)


def averaged(model: Any) -> Any:
    """Two running averages of the adapter; one is put in its place."""
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    adapter = torch.nn.ParameterList(trainable(model))
    plain = AveragedModel(adapter)
    moving = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for seed in range(3):
        trained(model, optimizer, 1, seed)
        schedule.step()
        plain.update_parameters(adapter)
        moving.update_parameters(adapter)
    found = [logits(model)]
    for average in (plain, moving):
        adapter.load_state_dict(average.module.state_dict())
        found.append(logits(model))
    assert not torch.equal(found[0], found[1]) and not torch.equal(*found[1:])
    return found


def saved_and_loaded_by_accelerate(model: Any, folder: Path) -> Any:
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def steps(seed: int) -> list[float]:
        found = []
        for ids in batches(2, seed):
            loss = loss_of(model, ids)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    steps(1)
    accelerator.save_state(str(folder))
    going_on = steps(2)
    accelerator.load_state(str(folder))
    assert steps(2) == going_on
    return going_on


def several_active(model: Any) -> Any:
    torch.manual_seed(4)
    model.add_adapter("second", lora(r=2, target_modules=["c_attn"]))
    model.base_model.set_adapter(["default", "second"])
    losses = trained(model)
    assert len({name.split(".")[-2] for name in trained_weights(model)}) == 2
    return losses, logits(model)


@pytest.mark.parametrize(
    "way",
    [lora_plus, scaled_losses, scaled_losses_by_a_fused_step, averaged, several_active],
)
def test_the_split_model_does_as_the_whole(way: Callable[[Any], Any], pair: Pair) -> None:
    ours, theirs = pair.adapted()
    assert_equal(way(ours), way(theirs))
    assert largest_difference(trained_weights(ours), trained_weights(theirs)) == 0


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


def test_accelerate_saves_and_loads_a_state(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = (
        saved_and_loaded_by_accelerate(model, tmp_path / name)
        for name, model in zip(("ours", "theirs"), pair.adapted(), strict=True)
    )
    assert ours == theirs


def test_a_larger_vocabulary_is_saved_with_its_embeddings(pair: Pair, tmp_path: Path) -> None:
    models = []
    for name, model in zip(("ours", "theirs"), pair.bare(), strict=True):
        torch.manual_seed(2)
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        model = adapted(model, modules_to_save=["wte"])
        ids = torch.tensor([[5, VOCAB, 9, VOCAB + 2, 30]])
        loss_of(model, ids).backward()
        torch.optim.SGD(trainable(model), lr=0.1).step()
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
        models.append(model)
    assert_equal(*map(logits, models))
    file = "adapter_model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    again, _ = pair.bare()
    again.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    again = PeftModel.from_pretrained(again, tmp_path / "ours")
    assert_equal(logits(again), logits(models[1].eval()))


@pytest.mark.parametrize("moving", [None, get_ema_multi_avg_fn(0.9)])
def test_an_average_of_all_weights_is_the_whole_model_s(pair: Pair, moving: Any) -> None:
    """Those of the trunk's blocks are the same in every model, and so in their average."""
    found = []
    for model in pair.adapted():
        average = AveragedModel(model, multi_avg_fn=moving)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for seed in range(3):
            trained(model, optimizer, 1, seed)
            average.update_parameters(model)
        assert not torch.equal(logits(average.module), logits(model))
        model.load_state_dict(average.module.state_dict())
        found.append([logits(average.module), logits(model)])
    assert_equal(*found)


def test_a_reference_model_stays_as_it_was(pair: Pair) -> None:
    found = []
    for model in pair.adapted():
        trained(model, steps=1)
        frozen = references.create_reference_model(model)
        assert not trainable(frozen)
        before = logits(frozen)
        trained(model, steps=1)
        assert torch.equal(logits(frozen), before) and not torch.equal(logits(model), before)
        found.append([before, logits(model)])
    assert_equal(*found)


def test_a_graph_that_a_step_has_left_behind_raises(pair: Pair) -> None:
    said = []
    for model in pair.adapted():
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        loss = loss_of(model, next(batches(1)))
        loss.backward(retain_graph=True)
        once = copy.deepcopy(in_the_trunk(model).grad)
        loss.backward(retain_graph=True)  # nothing has changed: twice the gradient
        assert once is not None
        assert torch.equal(in_the_trunk(model).grad, 2 * once)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
            loss.backward()
        said.append(error.type)
    assert said[0] is said[1]
