"""A run that goes on from a checkpoint is the undisturbed run, to the last bit."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
)

from client_service import SplitModelForCausalLM
from client_service.checkpoint import Checkpoint, Checkpoints
from client_service.checkpoint_files import MANIFEST, newest_whole
from client_service.data import batches
from client_service.training import StepMetrics, TrainingPlan, train
from client_service.whole import largest_difference, trained_weights, whole_twin
from shared import failpoints
from shared.errors import CheckpointError
from shared.models import family_of
from tests.conftest import Daemon
from tests.models import save_tiny_model

STEPS, MIDDLE, SPLIT = 8, 4, "1:3"
Edit = Callable[[bytes], bytes | None]

LINEAR = list(family_of("gpt2").linear_layers)


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_dropout": 0.1, "target_modules": LINEAR}
    return LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings | changes)


def adalora(**changes: Any) -> AdaLoraConfig:
    schedule: dict[str, Any] = {"total_step": STEPS, "tinit": 1, "tfinal": 2, "deltaT": 1}
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=3,
        lora_dropout=0.1,
        target_modules=LINEAR,
        fan_in_fan_out=True,
        **schedule | changes,
    )


def ia3() -> IA3Config:
    return IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)


def plan(**changes: Any) -> TrainingPlan:
    settings: dict[str, Any] = {"lr": 5e-3, "grad_accum": 2, "grad_clip": 0.5, "warmup_steps": 2}
    settings |= {"schedule": "cosine"} | changes
    return TrainingPlan(steps=STEPS, batch_size=2, **settings)


@dataclass
class Place:
    """A tiny model of four blocks, a daemon with the middle two, and where to write."""

    model: Path
    address: str
    out: Path
    opened: list[Any] = field(default_factory=list)

    def open(self, config: PeftConfig | None = None, **terms: Any) -> Any:
        split = SplitModelForCausalLM.from_pretrained(
            self.model, self.address, peft_config=config, **{"dropout": 0.1, "seed": 0} | terms
        )
        self.opened.append(split)
        return split

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def saving(self, every: int = MIDDLE, kept: int = 9) -> Checkpoints:
        return Checkpoints(self.checkpoints, every, kept)

    def newest(self, split: Any) -> Checkpoint:
        found = self.saving().newest(split)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("checkpoints") / "model", n_layer=4)


@pytest.fixture
def place(trunkd: Callable[..., Daemon], model_folder: Path, tmp_path: Path) -> Iterator[Place]:
    daemon = trunkd("--model", str(model_folder), "--split", SPLIT)
    place = Place(model_folder, daemon.address, tmp_path)
    yield place
    for split in place.opened:
        split.remote_trunk.close()


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets failpoints of this process."""
    return lambda setting: monkeypatch.setattr(failpoints, "_set", failpoints.parse(setting))


def fit(
    split: Any,
    how: TrainingPlan,
    saving: Checkpoints | None = None,
    start: Checkpoint | None = None,
) -> list[StepMetrics]:
    # Seven blocks in batches of two: a pass leaves one out, and the middle is within a pass.
    blocks = torch.randint(3, 512, (7, 12), generator=torch.Generator().manual_seed(0))
    data = batches(blocks, how.batch_size, how.seed, start.batches_taken if start else 0)
    save = saving.save_if_due if saving else None
    return list(train(split, data, how, start.restore if start else None, save))


def facts(metrics: list[StepMetrics]) -> list[tuple[float, ...]]:
    return [(m.step, m.loss, m.grad_norm, m.lr, m.tokens) for m in metrics]


def saved(split: Any, folder: Path) -> dict[str, Any]:
    """What is saved, byte for byte; safetensors and PEFT write some names in any order."""
    split.save_pretrained(folder)
    found: dict[str, Any] = {p.name: tensor_file(p) for p in folder.rglob("*.safetensors")}
    if (folder / "adapter_config.json").is_file():
        config = json.loads((folder / "adapter_config.json").read_text())
        found["config"] = config | {"target_modules": sorted(config.get("target_modules") or [])}
    return found


def tensor_file(path: Path) -> tuple[Any, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def check_resumes(
    place: Place,
    config: PeftConfig | None,
    how: TrainingPlan,
    at: int = MIDDLE,
    terms: dict[str, Any] | None = None,
) -> None:
    terms = terms or {}
    split = place.open(config, **terms)
    undisturbed = fit(split, how)
    watched = place.open(config, **terms)
    # Saving disturbs nothing.
    assert facts(fit(watched, how, place.saving(at))) == facts(undisturbed)
    for step in range(at + 1, STEPS + 1):
        shutil.rmtree(place.checkpoints / f"step-{step:08d}", ignore_errors=True)
    torch.manual_seed(99)  # what another process would have
    again = place.open(config, **terms)
    start = place.newest(again)
    assert start.step == at and start.batches_taken == 2 * at
    resumed = fit(again, how, place.saving(at), start)
    assert facts(resumed) == facts(undisturbed[at:])
    expected = saved(split, place.out / "undisturbed")
    assert saved(again, place.out / "resumed") == expected
    # A run that is complete only gives its weights.
    complete = place.open(config, **terms)
    assert fit(complete, how, place.saving(at), place.newest(complete)) == []
    assert saved(complete, place.out / "complete") == expected


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("config", "how", "terms"),
    [
        (lora(), plan(), {}),
        slow(lora(use_dora=True), plan(optimizer="adafactor"), {}),
        slow(lora(), plan(optimizer="sgd", schedule="linear"), {"trunk_peft_config": None}),
        slow(lora(), plan(), {"peft_parts": "trunk"}),
        slow(ia3(), plan(), {}),
        slow(
            PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=3,
                prefix_projection=True,
                encoder_hidden_size=16,
            ),
            plan(),
            {},
        ),
        slow(
            PromptEncoderConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
            ),
            plan(),
            {},
        ),
        (None, plan(), {}),
        slow(None, plan(), {"peft_parts": "top"}),
    ],
    ids=["lora", "dora", "frozen trunk", "trunk", "ia3", "prefix", "p-tuning", "ends", "top"],
)
def test_a_resumed_run_is_the_undisturbed_one(
    config: PeftConfig | None, how: TrainingPlan, terms: dict[str, Any], place: Place
) -> None:
    check_resumes(place, config, how, terms=terms)


@pytest.mark.parametrize("at", [slow(1), slow(3), 5, slow(6), slow(7)])
def test_adalora_goes_on_in_the_middle_of_its_allocation(at: int, place: Place) -> None:
    """Before, within and after its schedule, whose last allocation is at step 6."""
    check_resumes(place, adalora(), plan(), at)


@pytest.mark.slow
def test_adalora_on_one_side_goes_on(place: Place) -> None:
    check_resumes(place, adalora(), plan(), 3, {"peft_parts": "trunk"})


def test_a_run_in_two_halves_is_the_whole_model_s(place: Place) -> None:
    config, quiet = lora(lora_dropout=0.0), {"dropout": 0.0}
    split = place.open(config, **quiet)
    whole = whole_twin(place.model, split)
    expected = facts(fit(whole, plan()))
    assert facts(fit(split, plan(), place.saving())) == expected
    shutil.rmtree(place.checkpoints / f"step-{STEPS:08d}")
    again = place.open(config, **quiet, seed=5)
    assert facts(fit(again, plan(), start=place.newest(again))) == expected[MIDDLE:]
    assert largest_difference(trained_weights(again), trained_weights(whole)) == 0


def test_only_the_last_checkpoints_stay(place: Place) -> None:
    fit(place.open(lora()), plan(), place.saving(every=3, kept=2))
    left = sorted(path.name for path in place.checkpoints.iterdir())
    assert left == ["step-00000006", "step-00000008"]  # the last step's too


@pytest.fixture(scope="module")
def whole_checkpoints(
    trunkd: Callable[..., Daemon], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of steps 4 and 8, to be copied and damaged."""
    daemon = trunkd("--model", str(model_folder), "--split", SPLIT)
    place = Place(model_folder, daemon.address, tmp_path_factory.mktemp("whole"))
    fit(place.open(lora()), plan(), place.saving())
    place.opened[0].remote_trunk.close()
    return place.checkpoints


def damage(folder: Path, name: str, edit: Edit) -> None:
    changed = edit((folder / name).read_bytes())
    (folder / name).unlink()
    if changed is not None:
        (folder / name).write_bytes(changed)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("model.safetensors", lambda data: None, "model.safetensors: is missing"),
        ("optimizer.safetensors", lambda data: data[:-1], "optimizer.safetensors: has "),
        ("model.safetensors", lambda data: data[:-1] + b"?", "model.safetensors: was changed"),
        ("state.json", lambda data: b" " + data[1:], "state.json: was changed"),
        (MANIFEST, lambda data: None, "manifest.json: is missing"),
        (MANIFEST, lambda data: data[:-9], "manifest.json: not readable"),
        (MANIFEST, lambda data: b'{"format": 2, "files": []}', "manifest.json: is no manifest"),
        (MANIFEST, lambda data: b'{"format": 1}', "manifest.json: format 1; this program reads 2"),
        (MANIFEST, lambda data: data.replace(b'"step": ', b'"step": 1'), "manifest.json: is of"),
        (MANIFEST, lambda data: data.replace(b"rng.", b"../rng."), "rng.safetensors: is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    name: str,
    edit: Edit,
    said: str,
    whole_checkpoints: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    parent = tmp_path / "checkpoints"
    shutil.copytree(whole_checkpoints, parent)
    manifest = json.loads((parent / "step-00000008" / MANIFEST).read_text())
    identity = manifest["weight_digest"], manifest["split"]
    damage(parent / "step-00000008", name, edit)
    with caplog.at_level(logging.WARNING):
        found = newest_whole(parent, *identity)
    assert found is not None and found[0].name == "step-00000004"
    assert [r for r in caplog.messages if "step-00000008" in r and said in r]
    damage(parent / "step-00000004", name, edit)
    with pytest.raises(CheckpointError, match=r"step-00000008.*step-00000004") as error:
        newest_whole(parent, *identity)
    assert str(error.value).count(said) == 2


def test_a_foreign_checkpoint_is_refused(whole_checkpoints: Path, place: Place) -> None:
    with pytest.raises(CheckpointError, match="belongs to trunk weights"):
        newest_whole(whole_checkpoints, "0" * 64, SPLIT)
    with pytest.raises(CheckpointError, match="is split 1:3"):
        digest = json.loads((whole_checkpoints / "step-00000004" / MANIFEST).read_text())
        newest_whole(whole_checkpoints, digest["weight_digest"], "1:2")
    assert newest_whole(place.out / "nowhere", "", SPLIT) is None
    shutil.copytree(whole_checkpoints, place.checkpoints)
    for config, how in [
        (lora(r=2), plan()),
        (ia3(), plan()),
        (lora(), plan(optimizer="sgd")),
        (lora(), plan(optimizer="adafactor")),
    ]:
        other = place.open(config)
        with pytest.raises(CheckpointError):
            fit(other, how, start=place.newest(other))


def test_a_run_goes_on_before_a_damaged_checkpoint_and_replaces_it(place: Place) -> None:
    how = plan()
    undisturbed = fit(place.open(lora()), how, place.saving())
    damage(place.checkpoints / "step-00000008", "optimizer.json", lambda data: data[:-1])
    again = place.open(lora())
    start = place.newest(again)
    assert start.step == MIDDLE
    resumed = fit(again, how, place.saving(kept=1), start)
    assert facts(resumed) == facts(undisturbed[MIDDLE:])
    assert place.newest(again).step == STEPS
    assert [path.name for path in place.checkpoints.iterdir()] == ["step-00000008"]


@pytest.mark.parametrize(
    ("where", "survives"),
    [
        ("before@2", False),
        ("file@12", False),
        ("manifest@2", False),
        ("rename@2", False),
        ("after@2", True),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    where: str, survives: bool, place: Place, fail: Callable[[str], None]
) -> None:
    point, _, count = where.partition("@")
    split = place.open(lora())
    fail(f"client.checkpoint.{point}=enospc@{count}")
    blocks = torch.randint(3, 512, (7, 12), generator=torch.Generator().manual_seed(0))
    seen = []
    with pytest.raises(CheckpointError, match=r"No space left.* step-00000002 is whole") as error:
        saving = place.saving(every=2, kept=1)
        for metrics in train(split, batches(blocks, 2, 0), plan(), save=saving.save_if_due):
            seen.append(metrics.step)
    assert "step-00000004: was not saved" in str(error.value)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    assert seen == [1, 2, 3, 4]  # their metrics were there before
    left = sorted(path.name for path in place.checkpoints.iterdir())
    assert left == ["step-00000002", "step-00000004"][: 1 + survives]
    assert place.newest(split).step == (4 if survives else 2)


def test_a_full_disk_at_the_first_checkpoint(place: Place, fail: Callable[[str], None]) -> None:
    fail("client.checkpoint.manifest=enospc")
    with pytest.raises(CheckpointError, match="there is no checkpoint before it"):
        fit(place.open(lora()), plan(), place.saving(every=2))
    assert list(place.checkpoints.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(place: Place) -> None:
    for name in (".step-00000004.partial", ".step-00000002.removed"):
        (place.checkpoints / name).mkdir(parents=True)
    assert place.saving().newest(place.open(lora())) is None
    assert list(place.checkpoints.iterdir()) == []


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7])
def test_the_data_goes_on_where_it_was(start: int) -> None:
    blocks = torch.arange(7)[:, None]
    ordered = [next_ for next_, _ in zip(batches(blocks, 2, 5), range(12), strict=False)]
    later = batches(blocks, 2, 5, start)
    assert all(torch.equal(next(later), batch) for batch in ordered[start:])
