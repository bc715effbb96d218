"""What tenants have of their own on a shared trunk: adapters and optimizers, none of others'."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor

from client_service import SplitModelForCausalLM
from client_service.calls import ForwardCall, SessionTerms
from client_service.optimizer_spec import OptimizerSettings, adamw
from client_service.session import TrunkSession
from client_service.whole import whole_twin
from shared.adapters.config import config_to_json
from shared.errors import AdapterError, OptimizerError, ProtocolError, TensorError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.conftest import Daemon
from tests.integration.test_equivalence import lora, losses, padded_batches
from tests.integration.test_methods import adalora
from tests.models import save_tiny_model

Start = Callable[..., Daemon]

HIDDEN = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
LORA = lora("gpt2", r=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("gpt2") / "model")


@pytest.fixture
def daemon(trunkd: Start, folder: Path) -> Daemon:
    return trunkd("--model", str(folder))


def open_model(folder: Path, daemon: Daemon, config: PeftConfig | None = None, **more: Any) -> Any:
    return SplitModelForCausalLM.from_pretrained(
        folder, daemon.address, peft_config=config or LORA, **more
    )


@pytest.fixture
def session(daemon: Daemon) -> Iterator[TrunkSession]:
    opened = TrunkSession(daemon.address, SessionTerms(peft_config_json=config_to_json(LORA)))
    yield opened
    opened.close()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


TENANTS: dict[str, PeftConfig] = {
    "lora": lora("gpt2", r=3),
    "dora": lora("gpt2", r=8, use_dora=True),
    "adalora": adalora("gpt2"),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def trained(model: Any, steps: int = 6) -> dict[str, torch.Tensor]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocates = hasattr(model.base_model, "update_and_allocate")
    for step, batch in zip(range(1, steps + 1), padded_batches(), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        if allocates:
            model.update_and_allocate(step)
        optimizer.zero_grad()
    weights: dict[str, torch.Tensor] = model.joined_adapter().weights
    model.remote_trunk.close()
    return weights


def test_tenants_that_train_at_once_end_as_they_would_alone(folder: Path, daemon: Daemon) -> None:
    alone = {name: trained(open_model(folder, daemon, c)) for name, c in TENANTS.items()}
    models = {name: open_model(folder, daemon, config) for name, config in TENANTS.items()}
    together: dict[str, dict[str, torch.Tensor]] = {}

    def train(name: str) -> None:
        together[name] = trained(models[name])

    threads = [threading.Thread(target=train, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(together[name], alone[name]) for name in TENANTS)


def test_a_session_has_several_adapters_and_the_blocks_stay_as_they_were(
    daemon: Daemon, session: TrunkSession
) -> None:
    bare = ForwardCall(without_adapter=True)
    before = session.forward(HIDDEN, bare).hidden_BTD
    count = session.add_adapter("second", config_to_json(lora("gpt2", r=2)), seed=5)
    session.add_adapter("third", config_to_json(TENANTS["ia3"]), seed=5)
    listed = {a.name: a.trainable_parameters for a in session.adapters()}
    assert listed.keys() == {"", "second", "third"} and listed["second"] == count == listed[""] / 2
    moved = {n: w + 0.5 for n, w in session.adapter("second").items()}
    session.restore(moved, "second")
    assert same(session.adapter("second"), moved)
    first, second = (
        session.forward(HIDDEN, ForwardCall(adapter=name)).hidden_BTD for name in ("", "second")
    )
    assert torch.equal(first, before)  # a fresh LoRA adds nothing
    assert float((second - before).abs().max()) > 1e-3
    session.remove_adapter("second")
    with pytest.raises(AdapterError, match="no adapter 'second'; it has: '', 'third'"):
        session.forward(HIDDEN, ForwardCall(adapter="second"))
    assert torch.equal(session.forward(HIDDEN, bare).hidden_BTD, before)
    with TrunkSessionOf(daemon) as other:
        assert torch.equal(other.forward(HIDDEN, bare).hidden_BTD, before)


class TrunkSessionOf:
    """Another tenant, for the length of a block."""

    def __init__(self, daemon: Daemon) -> None:
        terms = SessionTerms(peft_config_json=config_to_json(LORA))
        self._session = TrunkSession(daemon.address, terms)

    def __enter__(self) -> TrunkSession:
        return self._session

    def __exit__(self, *_: Any) -> None:
        self._session.close()


def test_pefts_own_adapter_calls_reach_the_trunk(
    folder: Path, daemon: Daemon, tmp_path: Path
) -> None:
    model = open_model(folder, daemon)
    losses(model, 2, rate=1e-2)
    model.add_adapter("other", lora("gpt2", r=2))
    model.set_adapter("other")
    losses(model, 3, rate=1e-2)
    model.save_pretrained(tmp_path / "saved")
    batch = next(padded_batches(3))
    batch.pop("labels")

    def whole() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    with torch.no_grad():
        for name, place in (("other", "saved/other"), ("default", "saved")):
            model.set_adapter(name)
            plain = PeftModel.from_pretrained(whole(), tmp_path / place).eval()
            assert torch.allclose(model.eval()(**batch).logits, plain(**batch).logits, atol=1e-5)
        expected = whole()(**batch).logits
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, expected)
        assert not torch.equal(model(**batch).logits, expected)
    model.delete_adapter("other")
    assert [a.name for a in model.remote_trunk.session.adapters()] == [""]
    model.load_adapter(tmp_path / "saved" / "other", "back")
    assert {a.name for a in model.remote_trunk.session.adapters()} == {"", "back"}
    with pytest.raises(AdapterError, match="session's own"):
        model.delete_adapter("default")


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "transformers adafactor": lambda p: Adafactor(p),
    "adamw with amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2, decoupled_weight_decay=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trunk_steps_as_the_clients_optimizer_and_resumes(
    name: str, folder: Path, daemon: Daemon, tmp_path: Path
) -> None:
    """Saved in the middle into ordinary files, gone on with in a new session; against the whole."""
    model = open_model(folder, daemon)
    whole = whole_twin(folder, model)
    expected = run(whole, OPTIMIZERS[name], 0, 6)
    found = run(model, OPTIMIZERS[name], 0, 3, save_to=tmp_path)
    model.remote_trunk.close()
    again = open_model(folder, daemon)
    again.load_adapter(tmp_path, is_trainable=True)
    found += run(again, OPTIMIZERS[name], 3, 6, load_from=tmp_path)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
    assert again.remote_trunk.session.adapters()[0].committed_step == 6


def run(
    model: Any,
    make: Callable[[Any], torch.optim.Optimizer],
    start: int,
    end: int,
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> list[float]:
    model.train()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    if load_from is not None:
        optimizer.load_state_dict(torch.load(load_from / "optimizer.pt", weights_only=True))
    found = []
    for step, batch in zip(range(end), padded_batches(), strict=False):
        if step < start:
            continue
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    if save_to is not None:
        torch.save(optimizer.state_dict(), save_to / "optimizer.pt")
        model.save_pretrained(save_to)
    return found


class Mine(torch.optim.AdamW):
    """Has a step of its own, for all the trunk knows."""


@pytest.mark.parametrize("kind", [Mine, torch.optim.Muon])
def test_an_optimizer_the_trunk_does_not_know_is_refused_before_anything_moves(
    kind: Any, folder: Path, daemon: Daemon
) -> None:
    model = open_model(folder, daemon).train()
    parameters = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
    optimizer = kind(parameters, lr=1e-2)
    before = model.joined_adapter().weights
    model(**next(padded_batches())).loss.backward()
    with pytest.raises(OptimizerError, match=r"accepted: adamw"):
        optimizer.step()
    assert same(model.joined_adapter().weights, before)


def test_an_optimizer_state_that_does_not_fit_changes_nothing(folder: Path, daemon: Daemon) -> None:
    model = open_model(folder, daemon)
    losses(model, 2)
    session = model.remote_trunk.session
    state = session.optimizer_state()
    for bad in (
        {n: t[:1] for n, t in state.items() if t.ndim == 2},
        {n: t for n, t in state.items() if not n.endswith("exp_avg")},
        {"no/such": torch.zeros(1)},
    ):
        with pytest.raises(OptimizerError):
            session.restore_optimizer(bad, adamw(1e-3), 9)
    with pytest.raises(OptimizerError, match="accepted: adamw"):
        session.restore_optimizer(state, OptimizerSettings("magic"), 9)
    assert same(session.optimizer_state(), state)
    assert session.adapters()[0].committed_step == 2


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ".hidden", "", "x" * 65, "a\0b"])
def test_a_name_that_could_leave_a_folder_is_refused(name: str, session: TrunkSession) -> None:
    with pytest.raises(AdapterError, match="name"):
        session.add_adapter(name, config_to_json(LORA), 0)
    assert [a.name for a in session.adapters()] == [""]


def test_another_tenants_adapter_cannot_be_taken(daemon: Daemon, session: TrunkSession) -> None:
    with TrunkSessionOf(daemon) as owner:
        owner.add_adapter("secret", config_to_json(LORA), 7)
        for ask in (
            lambda: session.adapter("secret"),
            lambda: session.gradients("secret"),
            lambda: session.optimizer_state("secret"),
            lambda: session.restore({}, "secret"),
            lambda: session.remove_adapter("secret"),
            lambda: session.forward(HIDDEN, ForwardCall(adapter="secret")),
        ):
            with pytest.raises(AdapterError, match="no adapter 'secret'"):
                ask()
        assert {a.name for a in owner.adapters()} == {"", "secret"}


def test_an_adapter_of_other_trunk_weights_is_refused(
    folder: Path, daemon: Daemon, trunkd: Start, tmp_path: Path
) -> None:
    """Taken from another model of the same shape: everything fits but what it was trained on."""
    other = save_tiny_model("gpt2", tmp_path / "other", layer_norm_epsilon=1e-3)
    elsewhere = open_model(other, trunkd("--model", str(other)))
    losses(elsewhere, 2, rate=1e-2)
    elsewhere.save_pretrained(tmp_path / "theirs")
    model = open_model(folder, daemon)
    losses(model, 2, rate=1e-2)
    before = model.joined_adapter().weights
    with pytest.raises(AdapterError, match="was trained on trunk weights"):
        model.load_adapter(tmp_path / "theirs")
    with pytest.raises(AdapterError, match="was trained on trunk weights"):
        SplitModelForCausalLM.from_pretrained(folder, daemon.address, adapter=tmp_path / "theirs")
    assert same(model.joined_adapter().weights, before)


@pytest.mark.parametrize("kind", ["rank", "parameters", "announced", "too many"])
def test_an_oversized_upload_is_refused(kind: str, trunkd: Start, folder: Path) -> None:
    limits = ["--max-adapter-rank", "4", "--max-adapter-parameters", "50000"]
    limits += ["--max-adapters-per-session", "2"]
    daemon = trunkd("--model", str(folder), *limits)
    terms = SessionTerms(peft_config_json=config_to_json(LORA))
    session = TrunkSession(daemon.address, terms)
    before = session.adapter()
    big = {f"{n}.x": torch.zeros(1_000_000) for n in before}
    every = {"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"], "modules_to_save": ["mlp"]}
    refused: dict[str, Callable[[], Any]] = {
        "rank": lambda: session.add_adapter("a", config_to_json(lora("gpt2", r=5)), 0),
        "parameters": lambda: session.add_adapter("a", config_to_json(LoraConfig(**every)), 0),
        "announced": lambda: session.restore(big),
        "too many": lambda: [session.add_adapter(n, config_to_json(LORA), 0) for n in "ab"],
    }
    said = {
        "rank": "accepts up to 4",
        "parameters": "accepts up to 50000",
        "announced": "bytes",
        "too many": "as many as are allowed",
    }
    with pytest.raises(Exception, match=said[kind]) as caught:
        refused[kind]()
    assert type(caught.value).__module__ == "shared.errors"
    assert same(session.adapter(), before)
    session.close()


def pickled() -> bytes:
    sink = io.BytesIO()
    torch.save({"adapter": threading.Thread}, sink)
    return sink.getvalue()


def test_a_pickle_is_never_read(folder: Path, daemon: Daemon, tmp_path: Path) -> None:
    model = open_model(folder, daemon)
    before = model.joined_adapter().weights
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickled())
    with pytest.raises(AdapterError, match="nothing is unpickled"):
        model.load_adapter(tmp_path)
    weights.write_bytes(pickled())  # under the other name
    with pytest.raises(AdapterError, match="not a readable adapter"):
        model.load_adapter(tmp_path)
    session = model.remote_trunk.session
    request = pb.SessionRequest(restore=pb.Restore())
    name = next(iter(session.adapter()))
    raw = torch.frombuffer(bytearray(pickled()), dtype=torch.uint8)
    with pytest.raises((AdapterError, TensorError, ProtocolError)):
        session._link.ask(request, {f"adapter/{name}": raw})
    assert same(model.joined_adapter().weights, before)


MISMATCHED: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "another rank": lambda w: {n: t[:1] if "lora_A" in n else t[:, :1] for n, t in w.items()},
    "a matrix missing": lambda w: dict(list(w.items())[:-1]),
    "escaping name": lambda w: w | {"../../x": torch.zeros(1)},
    "whole numbers": lambda w: {n: t.to(torch.int32) for n, t in w.items()},
    "not a number": lambda w: {n: t * float("nan") for n, t in w.items()},
}


@pytest.mark.parametrize("kind", MISMATCHED)
def test_a_mismatched_upload_changes_neither_side(
    kind: str, folder: Path, daemon: Daemon, tmp_path: Path
) -> None:
    model = open_model(folder, daemon)
    losses(model, 2, rate=1e-2)
    model.save_pretrained(tmp_path)
    losses(model, 2, rate=1e-2)
    before = model.joined_adapter().weights
    file = tmp_path / "adapter_model.safetensors"
    changed = {n: t.contiguous() for n, t in MISMATCHED[kind](load_file(file)).items()}
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError):
        model.load_adapter(tmp_path)
    assert same(model.joined_adapter().weights, before)
    session = model.remote_trunk.session
    theirs = session.adapter()
    with pytest.raises((AdapterError, TensorError)):
        session.restore(MISMATCHED[kind](theirs))
    assert same(session.adapter(), theirs)


def test_a_trunk_takes_only_the_methods_it_is_told_to(trunkd: Start, folder: Path) -> None:
    daemon = trunkd("--model", str(folder), "--peft-methods", '["LORA"]')
    session = TrunkSession(daemon.address, SessionTerms())
    assert list(session.info.peft_methods) == ["LORA"]
    with pytest.raises(AdapterError, match="does not accept IA3; accepted: LORA"):
        session.add_adapter("a", config_to_json(TENANTS["ia3"]), 0)
    session.close()
