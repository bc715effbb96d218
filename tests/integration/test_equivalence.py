"""The split system against the same model in one piece: loss, every gradient, every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from client_service import SplitModelForCausalLM
from client_service.calls import ForwardCall
from client_service.verify import Difference, VerifyPlan, verify
from client_service.whole import largest_difference, load_whole, trained_weights, whole_twin
from shared.errors import TensorError
from shared.models import family_of
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model

Start = Callable[..., Daemon]

CASES = [
    ("gpt2", "2:10", {}),
    pytest.param(*("gpt2", "1:2", {}), marks=pytest.mark.slow),
    pytest.param(
        *(
            "gpt2",
            "1:11",
            {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        ),
        marks=pytest.mark.slow,
    ),
    pytest.param(*("llama", "2:10", {"num_hidden_layers": 12}), marks=pytest.mark.slow),
    pytest.param(*("llama", "1:2", {"tie_word_embeddings": True}), marks=pytest.mark.slow),
    pytest.param(*("llama", "1:5", {}), marks=pytest.mark.slow),
    pytest.param(*("qwen2", "2:10", {"num_hidden_layers": 12}), marks=pytest.mark.slow),
    pytest.param(*("qwen2", "1:2", {}), marks=pytest.mark.slow),
    pytest.param(*("qwen2", "1:5", {}), marks=pytest.mark.slow),
    pytest.param(*("qwen3", "1:5", {}), marks=pytest.mark.slow),
    pytest.param(
        *(
            "qwen3",
            "2:4",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
        ),
        marks=pytest.mark.slow,
    ),
    pytest.param(*("mistral", "1:5", {}), marks=pytest.mark.slow),
    pytest.param(*("gemma", "1:5", {}), marks=pytest.mark.slow),
    pytest.param(*("gemma2", "1:5", {}), marks=pytest.mark.slow),
    pytest.param(*("phi", "1:5", {}), marks=pytest.mark.slow),
    ("phi", "2:4", {"qk_layernorm": True, "num_key_value_heads": 2}),
    pytest.param(*("gpt_neox", "1:5", {}), marks=pytest.mark.slow),
    ("gpt_neox", "2:4", {"use_parallel_residual": False, "rotary_pct": 1.0}),
]


def lora(family: str, **changes: Any) -> LoraConfig:
    targets = list(family_of(family).linear_layers)
    settings: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": targets,
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def padded_batches(seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Batches with left and with right padding in turn."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for side in ("left", "right"):
            ids = torch.randint(3, VOCAB, (3, 24), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, slice(0, 7) if side == "left" else slice(-7, None)] = 0
            labels = ids.masked_fill(mask == 0, -100)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_equal(found: Difference) -> None:
    """To the bit: both sides compute the same on one machine."""
    assert found.max_abs_loss_diff == found.max_abs_grad_diff == 0, found
    assert found.max_abs_adapter_diff == found.max_abs_grad_norm_diff == 0, found
    assert found.differing_ranks == 0, found
    # What AdaLoRA pruned is not saved: shorter sums are made in another order.
    assert found.max_abs_reloaded_logit_diff <= 1e-5, found


@pytest.mark.numeric
@pytest.mark.parametrize(("family", "split", "changes"), CASES)
def test_training_through_the_split_is_training_the_whole_model(
    family: str, split: str, changes: dict[str, Any], trunkd: Start, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", **changes)
    daemon = trunkd("--model", str(folder), "--split", split)
    plan = VerifyPlan(steps=20, grad_accum=2, grad_clip=0.3)
    found = verify(folder, daemon.address, lora(family), padded_batches(), plan)
    assert_equal(found)


def test_rotary_positions_have_no_end(trunkd: Start, tmp_path: Path) -> None:
    """As in transformers; a table of learned ones has one, and is refused by name."""
    ids = torch.arange(3, 143)[None]
    for family in ("llama", "gpt2"):
        folder = save_tiny_model(family, tmp_path / family, num_hidden_layers=6)
        daemon = trunkd("--model", str(folder), "--split", "2:4")
        split: Any = SplitModelForCausalLM.from_pretrained(folder, daemon.address)
        if family == "llama":
            whole = AutoModelForCausalLM.from_pretrained(folder)
            assert whole.config.max_position_embeddings < ids.shape[1]
            with torch.no_grad():
                assert torch.equal(split(ids).logits, whole(ids).logits)
                made = split.generate(ids[:, :125], max_new_tokens=8, do_sample=False)
                theirs = whole.generate(ids[:, :125], max_new_tokens=8, do_sample=False)
                assert torch.equal(made, theirs)
        else:
            hidden = torch.zeros(1, ids.shape[1], 64)
            with pytest.raises(TensorError, match="140 tokens are too long: the model has 128"):
                split.remote_trunk.session.forward(hidden, ForwardCall())
        split.remote_trunk.close()


def losses(
    model: Any, steps: int, rate: float = 1e-3, each: Callable[[], None] | None = None
) -> list[float]:
    model.train()
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    found = []
    for _, batch in zip(range(steps), padded_batches(), strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        if each is not None:
            each()
    return found


def test_a_run_with_dropout_repeats_itself_whatever_else_the_trunk_serves(
    trunkd: Start, tmp_path: Path
) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    address = trunkd("--model", str(folder)).address
    config = lora("gpt2", lora_dropout=0.1)

    def open_model(seed: int) -> Any:
        return SplitModelForCausalLM.from_pretrained(
            folder, address, peft_config=config, seed=seed, dropout=0.1
        )

    alone = losses(open_model(1), 6)
    neighbour = open_model(2).train()
    batch = next(padded_batches(9))

    def disturb() -> None:
        state = torch.get_rng_state()
        neighbour(**batch).loss.backward()
        torch.set_rng_state(state)

    assert losses(open_model(1), 6, each=disturb) == alone
    assert losses(open_model(3), 6) != alone


@pytest.mark.parametrize(
    ("trunk_config", "ranks"),
    [("same", {8}), (None, set()), (lora("gpt2", r=2, lora_alpha=4), {2})],
)
def test_an_adapter_is_saved_and_loaded_as_the_whole_model_s(
    trunk_config: Any, ranks: set[int], trunkd: Start, tmp_path: Path
) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    address = trunkd("--model", str(folder)).address
    split = SplitModelForCausalLM.from_pretrained(
        folder, address, peft_config=lora("gpt2"), trunk_peft_config=trunk_config
    )
    inside = [p for n, p in split.named_parameters() if ".h.5." in n and "lora_A" in n]
    assert {len(p) for p in inside} == ranks
    whole = whole_twin(folder, split)
    assert losses(split, 3, rate=1e-2) == losses(whole, 3, rate=1e-2)
    for name, model in (("ours", split), ("theirs", whole)):
        model.save_pretrained(tmp_path / name)
    file = "adapter_model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    again = SplitModelForCausalLM.from_pretrained(folder, address, adapter=tmp_path / "ours")
    plain = PeftModel.from_pretrained(load_whole(folder), tmp_path / "ours")
    losses(split, 2, rate=1e-2)
    split.load_adapter(tmp_path / "ours", "default")
    batch = next(padded_batches())
    with torch.no_grad():
        expected = whole.eval()(**batch).logits
        assert float((expected - load_whole(folder)(**batch).logits).abs().max()) > 1e-3
        for model in (split, again, plain):
            assert torch.equal(model.eval()(**batch).logits, expected)
    for model in (split, again):
        model.remote_trunk.close()


def test_a_dropped_graph_frees_the_trunks_state(trunkd: Start, tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    # Room for the adapter and ten boundary activations, not for fifty.
    daemon = trunkd("--model", str(folder), "--session-held-bytes", "450000")
    model = SplitModelForCausalLM.from_pretrained(
        folder, daemon.address, peft_config=lora("gpt2")
    ).train()
    batch = next(padded_batches())
    for _ in range(50):
        model(**batch)
    model(**batch).loss.backward()
    model.remote_trunk.close()


def test_a_seed_gives_the_whole_model_s_fresh_adapter(trunkd: Start, tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    torch.manual_seed(1)
    whole = trained_weights(get_peft_model(load_whole(folder), lora("gpt2")))
    state = torch.get_rng_state()

    def fresh(seed: int) -> dict[str, torch.Tensor]:
        split = SplitModelForCausalLM.from_pretrained(
            folder, trunkd("--model", str(folder)).address, peft_config=lora("gpt2"), seed=seed
        )
        split.remote_trunk.close()
        return trained_weights(split)

    assert largest_difference(fresh(1), whole) == 0
    assert largest_difference(fresh(2), whole) > 0
    assert torch.equal(torch.get_rng_state(), state)
