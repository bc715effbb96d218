"""Stored tensor names as they become the whole model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import CheckpointError
from shared.models import FAMILIES, SplitRange, family_of, open_checkpoint
from shared.models.checkpoint import canonical_name
from shared.models.digest import weight_digest
from shared.models.split_layout import write_split_layout
from shared.models.tensor_files import open_tensor_file
from tests.models import save_tiny_model


@pytest.mark.parametrize(
    ("stored", "shift", "canonical"),
    [
        ("h.0.ln_1.weight", 0, "transformer.h.0.ln_1.weight"),
        ("h.0.ln_1.weight", 2, "transformer.h.2.ln_1.weight"),
        ("transformer.h.11.mlp.c_fc.bias", 0, "transformer.h.11.mlp.c_fc.bias"),
        ("transformer.h.9.mlp.c_fc.bias", 2, "transformer.h.11.mlp.c_fc.bias"),
        ("wte.weight", 5, "transformer.wte.weight"),
        ("lm_head.weight", 5, "lm_head.weight"),
        ("h.0.attn.bias", 0, None),
        ("transformer.h.0.attn.masked_bias", 0, None),
        ("h.0.attn.c_attn.bias", 0, "transformer.h.0.attn.c_attn.bias"),
    ],
)
def test_gpt2_names(stored: str, shift: int, canonical: str | None) -> None:
    assert canonical_name(stored, family_of("gpt2"), shift) == canonical


def test_qwen2_keeps_the_bias_of_its_attention() -> None:
    name = "model.layers.3.self_attn.q_proj.bias"
    assert canonical_name(name, family_of("qwen2"), 0) == name


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("embed_out.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.3.attention.dense.bias", "gpt_neox.layers.3.attention.dense.bias"),
        ("gpt_neox.layers.0.attention.bias", None),
        ("gpt_neox.layers.0.attention.masked_bias", None),
        ("gpt_neox.layers.0.attention.rotary_emb.inv_freq", None),
    ],
)
def test_gpt_neox_names(stored: str, canonical: str | None) -> None:
    assert canonical_name(stored, family_of("gpt_neox")) == canonical


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"n_head": 2}),
        ("mistral", {"sliding_window": None}),
        ("qwen3", {"rms_norm_eps": 1e-5}),
        ("gemma", {"hidden_act": "relu"}),
        ("gemma2", {"hidden_activation": "relu"}),
        ("gemma2", {"attn_logit_softcapping": 40.0}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"layer_types": ["full_attention"] * 6}),
        ("phi", {"partial_rotary_factor": 1.0}),
        ("phi", {"layer_norm_eps": 1e-3}),
        ("gpt_neox", {"rotary_pct": 1.0}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_the_digest_tells_the_same_tensors_computed_otherwise_apart(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    split = SplitRange(2, 4)
    one = open_checkpoint(save_tiny_model(family, tmp_path / "one"))
    other = open_checkpoint(save_tiny_model(family, tmp_path / "other", **changes))
    name = one.layer_names(split)[0]
    assert one.layer_names(split) == other.layer_names(split)
    assert torch.equal(one.read(name), other.read(name))
    assert weight_digest(one, split) != weight_digest(other, split)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_layout_has_the_whole_models_names_values_and_digest(
    family: str, tmp_path: Path
) -> None:
    whole = open_checkpoint(save_tiny_model(family, tmp_path / "whole"))
    split = SplitRange(2, 4)
    files = write_split_layout(tmp_path / "whole", split, tmp_path / "parts")
    parts = open_checkpoint(tmp_path / "parts")
    assert set(parts.names()) >= set(whole.names())
    assert all(torch.equal(parts.read(name), whole.read(name)) for name in whole.names())
    assert weight_digest(parts, split) == weight_digest(whole, split)
    with pytest.raises(CheckpointError, match="exists"):
        write_split_layout(tmp_path / "whole", split, tmp_path / "parts")
    files["trunk"].unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "parts")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin", "w.pth"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    tensors = {"a": torch.ones(64, 64)}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    assert torch.equal(open_tensor_file(path).read("a"), tensors["a"])
    for harmed in (path.read_bytes()[:-300], b"", b"\0" * 500, b"PK\x03\x04" + b"\1" * 500):
        path.write_bytes(harmed)
        with pytest.raises(CheckpointError, match=name):
            open_tensor_file(path)
    with pytest.raises(CheckpointError, match="not a weight file"):
        (tmp_path / "w.gguf").write_bytes(b"GGUF")
        open_tensor_file(tmp_path / "w.gguf")
