"""What tenants have of their own on a shared trunk: adapters, none of others', within limits."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig

from client_service import SplitModelForCausalLM
from client_service.adapter_base import note_base
from client_service.whole import largest_difference, trained_weights, whole_twin
from shared.errors import AdapterError, ResourceExhaustedError, TensorError
from tests.by_hand import ByHand
from tests.conftest import Daemon
from tests.integration.test_equivalence import lora, padded_batches
from tests.integration.test_methods import adalora
from tests.models import save_tiny_model

Start = Callable[..., Daemon]

HIDDEN = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def daemon(trunkd: Start, tiny_gpt2: Path) -> Daemon:
    return trunkd("--model", str(tiny_gpt2))


TENANTS: dict[str, PeftConfig] = {
    "lora": lora("gpt2", r=3),
    "dora": lora("gpt2", r=8, use_dora=True),
    "adalora": adalora("gpt2"),
    "ia3": IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True),
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
    return trained_weights(model)


@pytest.mark.numeric
def test_tenants_that_train_at_once_end_as_their_whole_models(
    tiny_gpt2: Path, daemon: Daemon
) -> None:
    models: dict[str, Any] = {
        name: SplitModelForCausalLM.from_pretrained(tiny_gpt2, daemon.address, peft_config=config)
        for name, config in TENANTS.items()
    }
    alone = {name: trained(whole_twin(tiny_gpt2, model)) for name, model in models.items()}
    together: dict[str, dict[str, torch.Tensor]] = {}

    def train(name: str) -> None:
        together[name] = trained(models[name])

    threads = [threading.Thread(target=train, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: largest_difference(together[n], alone[n]) for n in TENANTS} == dict.fromkeys(
        TENANTS, 0.0
    )
    for model in models.values():
        model.remote_trunk.close()


def test_an_adapter_of_another_base_is_told_with_both(
    tiny_gpt2: Path, daemon: Daemon, trunkd: Start, tmp_path: Path, caplog: Any
) -> None:
    """Of another model of the same shape: everything fits but what it was trained on."""
    other = save_tiny_model("gpt2", tmp_path / "other", layer_norm_epsilon=1e-3)
    model: Any = SplitModelForCausalLM.from_pretrained(
        other, trunkd("--model", str(other)).address, peft_config=lora("gpt2")
    )
    model.save_pretrained(tmp_path / "theirs")
    note_base(tmp_path / "theirs", model.remote_trunk.session)
    digests = [model.remote_trunk.session.info.weight_digest, daemon.ready["weight_digest"]]
    model.remote_trunk.close()
    with caplog.at_level(logging.WARNING, "client_service.adapter_base"):
        for folder, address in ((other, trunkd("--model", str(other))), (tiny_gpt2, daemon)):
            assert not caplog.messages
            SplitModelForCausalLM.from_pretrained(
                folder, address.address, adapter=tmp_path / "theirs"
            ).remote_trunk.close()
    (said,) = caplog.messages
    assert "trained on a base with weight_digest" in said and all(d in said for d in digests)


WIDE = {"target_modules": ["c_attn", "c_fc", "c_proj"]}
LIMITS = ("--max-adapter-rank", "4", "--max-adapter-parameters", "30000")
LIMITS += ("--max-adapters-per-session", "2", "--tenant-adapter-parameters", "12000")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (lora("gpt2", r=5), "accepts numbers up to 4"),
        (lora("gpt2", r=2, rank_pattern={"c_fc": 5}), "accepts numbers up to 4"),
        (lora("gpt2", r=4, **WIDE), "adapter of 32768 parameters; this trunk accepts up to 30000"),
    ],
)
def test_an_oversized_adapter_is_refused(
    config: LoraConfig, said: str, trunkd: Start, tiny_gpt2: Path
) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), *LIMITS)
    with pytest.raises(AdapterError, match=said):
        ByHand(daemon.address, config)


def test_an_adapter_too_many_is_refused_and_those_before_stay(
    trunkd: Start, tiny_gpt2: Path
) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), *LIMITS)
    config = lora("gpt2", r=4, target_modules=["c_attn"], init_lora_weights=False)
    tenant = ByHand(daemon.address, config)
    model, before = tenant.client.model, tenant.client.compute(HIDDEN)
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert not torch.equal(tenant.client.compute(HIDDEN), before)
    model.add_adapter("third", config)
    with pytest.raises(AdapterError, match="3 adapters in one model; this trunk accepts up to 2"):
        tenant.client.compute(HIDDEN)
    model.delete_adapter("third")
    model.set_adapter("default")
    assert torch.equal(tenant.client.compute(HIDDEN), before)
    with pytest.raises(ResourceExhaustedError, match="tenant_adapter_parameters"):
        ByHand(daemon.address, config)  # what all sessions of a tenant have together
    tenant.close()


def test_more_numbers_than_an_adapter_may_have_are_not_read(trunkd: Start, tiny_gpt2: Path) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), *LIMITS)
    tenant = ByHand(daemon.address, lora("gpt2", r=4, target_modules=["c_attn"]))
    before = tenant.forward(HIDDEN)
    big = tuple(torch.zeros(1_000_000) for _ in tenant.everything().tensors)
    with pytest.raises(TensorError, match="bytes"):
        tenant.push(HIDDEN, tenant.everything(tensors=big))
    assert torch.equal(tenant.forward(HIDDEN), before)
    tenant.close()
