"""Every method of PEFT 0.21 and its variants: one row each, for GPT-2 and for families like Llama.

``make parity`` and the tests walk this table; each row is tried on the whole model and on the split
one.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

from tests.models import tiny_model

Fields = dict[str, Any]

_LINEAR = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "up_proj", "down_proj"]}
_SQUARE = {"gpt2": ["attn.c_proj"], "llama": ["q_proj", "o_proj"]}
_WIDE = {"gpt2": ["c_fc"], "llama": ["up_proj"]}
_NORMS = {"gpt2": ["ln_1", "ln_2"], "llama": ["input_layernorm", "post_attention_layernorm"]}
_BLOCK = {"gpt2": r"transformer\.h", "llama": r"model\.layers"}


@dataclass(frozen=True)
class Row:
    """One way to configure PEFT."""

    name: str
    kind: str
    """PEFT's configuration class."""
    fields: Callable[[str], Fields] = lambda family: {}
    """More of them, by family."""
    targets: dict[str, list[str]] | None = dataclasses.field(default_factory=lambda: _LINEAR)
    inputs: Fields = dataclasses.field(default_factory=dict)
    """What a forward is given besides the tokens of three rows."""

    def config(self, family: str) -> PeftConfig:
        """Makes the configuration for a family.

        Raises:
            Exception: Whatever PEFT does.
        """
        like = "gpt2" if family == "gpt2" else "llama"
        made = getattr(peft, self.kind)
        given: Fields = {"task_type": "CAUSAL_LM"}
        names = {f.name for f in dataclasses.fields(made)}
        if self.targets is not None:
            given["target_modules"] = list(self.targets[like])
        if "fan_in_fan_out" in names:
            given["fan_in_fan_out"] = like == "gpt2"
        config: PeftConfig = made(**given | self.fields(like))
        return config


def _row(name: str, kind: str, targets: Any = _LINEAR, **fields: Any) -> Row:
    return Row(name, kind, lambda family: fields, targets)


def _lora(name: str, **fields: Any) -> Row:
    return _row(
        f"LoRA, {name}" if name else "LoRA", "LoraConfig", **{"r": 4, "lora_alpha": 6} | fields
    )


def _pattern(family: str) -> Fields:
    name = "c_attn" if family == "gpt2" else "q_proj"
    return {
        "r": 4,
        "rank_pattern": {name: 2, rf"{_BLOCK[family]}\.2\..*": 3},
        "alpha_pattern": {rf"1\..*\.{name}": 32},
    }


@functools.cache
def _experts(family: str) -> tuple[tempfile.TemporaryDirectory[str], Fields]:
    """Two saved adapters of a tiny model of four blocks, as long as this process lasts."""
    folder = tempfile.TemporaryDirectory()
    config = LoraConfig(
        r=2,
        target_modules=_LINEAR[family],
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_model(family, num_hidden_layers=4), config, "0")
    model.add_adapter("1", config)
    model.save_pretrained(folder.name)
    return folder, {name: str(Path(folder.name) / name) for name in ("0", "1")}


_TASKS = {"task_ids": torch.tensor([0, 1, 0])}

ROWS: tuple[Row, ...] = (
    _lora(""),
    _lora("rsLoRA", use_rslora=True),
    _lora("DoRA", use_dora=True),
    _lora("bias=lora_only", bias="lora_only"),
    _lora("bias=all", bias="all"),
    _lora("lora_bias", lora_bias=True),
    Row("LoRA, rank and alpha patterns", "LoraConfig", _pattern),
    _lora("alpha 0.5", lora_alpha=0.5),
    _lora("layers_to_transform", layers_to_transform=[1, 3]),
    _lora("one of the ends", layers_to_transform=[0]),
    Row(
        "LoRA, regex",
        "LoraConfig",
        lambda family: {"r": 4, "target_modules": rf"{_BLOCK[family]}\.[0-2]\..*(c_attn|up_proj)"},
        None,
    ),
    _lora("all-linear", target_modules="all-linear"),
    Row(
        "LoRA, exclude_modules",
        "LoraConfig",
        lambda family: {"r": 4, "exclude_modules": rf"{_BLOCK[family]}\.1\..*"},
    ),
    _lora("gaussian", init_lora_weights="gaussian"),
    _lora("orthogonal", init_lora_weights="orthogonal"),
    _lora("init false", init_lora_weights=False),
    _lora("PiSSA", init_lora_weights="pissa"),
    _lora("OLoRA", init_lora_weights="olora"),
    _lora("MiCA", init_lora_weights="mica"),
    _lora("LoftQ", init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
    _lora("EVA", init_lora_weights="eva"),
    _lora("CorDA", init_lora_weights="corda"),
    _lora("trainable_token_indices", trainable_token_indices=[3, 5]),
    Row(
        "LoRA, modules_to_save of norms",
        "LoraConfig",
        lambda family: {"r": 4, "modules_to_save": _NORMS[family][:1]},
    ),
    Row(
        "LoRA, modules_to_save of matrices",
        "LoraConfig",
        lambda family: {"r": 4, "modules_to_save": ["c_proj" if family == "gpt2" else "o_proj"]},
    ),
    _lora("modules_to_save of the head", modules_to_save=["lm_head"]),
    Row(
        "LoRA, modules_to_save of a whole MLP",
        "LoraConfig",
        lambda family: {
            "r": 4,
            "target_modules": ["c_attn" if family == "gpt2" else "q_proj"],
            "modules_to_save": ["mlp"],
        },
        None,
    ),
    _lora("QA-LoRA", use_qalora=True),
    _lora("VeLoRA", velora_config=VeloraConfig(num_groups=4)),
    _lora("KaSA", kasa_config=KasaConfig()),
    _lora("MonteCLoRA", monteclora_config=MontecloraConfig()),
    _lora("aLoRA", alora_invocation_tokens=[3, 4]),
    _lora("Arrow", arrow_config=ArrowConfig()),
    _lora(
        "BD-LoRA",
        use_bdlora=BdLoraConfig(
            nblocks=2,
            target_modules_bd_a=["c_attn", "q_proj", "v_proj"],
            target_modules_bd_b=["c_fc", "up_proj", "down_proj"],
        ),
    ),
    _lora("layer_replication", layer_replication=[(0, 2), (1, 4)]),
    Row(
        "LoRA, target_parameters",
        "LoraConfig",
        lambda family: {
            "r": 4,
            "target_parameters": ["c_fc.weight" if family == "gpt2" else "up_proj.weight"],
        },
        None,
    ),
    _row("AdaLoRA", "AdaLoraConfig", total_step=9, target_r=2, init_r=4, tinit=1, tfinal=2),
    Row(
        "IA3",
        "IA3Config",
        lambda family: {"feedforward_modules": ["c_fc"] if family == "gpt2" else ["down_proj"]},
    ),
    _row("IA3, none feed-forward", "IA3Config", feedforward_modules=[]),
    _row("LoHa", "LoHaConfig", r=4),
    _row("LoKr", "LoKrConfig", r=4),
    _row("LoKr, decompose_both", "LoKrConfig", r=2, decompose_both=True, decompose_factor=4),
    _row("LoKr, lycoris", "LoKrConfig", r=4, init_weights="lycoris"),
    _row("VeRA", "VeraConfig", r=8),
    _row("VeRA, save_projection=False", "VeraConfig", r=8, save_projection=False),
    _row("OFT", "OFTConfig", oft_block_size=8),
    _row("OFT, shared, constrained", "OFTConfig", oft_block_size=8, block_share=True, coft=True),
    _row("BOFT", "BOFTConfig", _SQUARE, boft_block_size=4),
    _row("HRA", "HRAConfig", r=4),
    _row("HRA, Gram-Schmidt", "HRAConfig", r=4, apply_GS=True),
    _row("HiRA", "HiraConfig", r=4),
    _row("FourierFT", "FourierFTConfig", n_frequency=50),
    _row("VB-LoRA", "VBLoRAConfig", r=2, num_vectors=8, vector_length=32),
    _row("LN tuning", "LNTuningConfig", _NORMS),
    _row("MiSS", "MissConfig", r=4),
    _row("MiSS, bat", "MissConfig", _SQUARE, r=8, init_weights="bat"),
    _row("MiSS, mini", "MissConfig", r=8, mini_r=2, init_weights="mini"),
    _row("RandLoRA", "RandLoraConfig", r=4),
    _row("RandLoRA, sparse", "RandLoraConfig", r=4, sparse=True),
    _row("C3A", "C3AConfig", block_size=32),
    _row("SHiRA", "ShiraConfig", r=4),
    _row("SHiRA, seeded", "ShiraConfig", r=4, random_seed=5),
    _row("RoAd 1", "RoadConfig", group_size=8),
    _row("RoAd 4", "RoadConfig", variant="road_4", group_size=8),
    _row("WaveFT", "WaveFTConfig", n_frequency=50),
    _row("GraLoRA", "GraloraConfig", r=8),
    _row("GraLoRA, hybrid", "GraloraConfig", r=8, hybrid_r=4),
    _row("DeLoRA", "DeloraConfig", r=4),
    _row("OSF", "OSFConfig", effective_rank=8),
    _row("PSOFT", "PsoftConfig", r=8),
    _row("BEFT", "BeftConfig"),
    _row("DEFT", "DeftConfig", r=4),
    _row("DEFT, qr", "DeftConfig", r=4, decomposition_method="qr"),
    _row("Lily", "LilyConfig", r=4, stride_A=2, num_B=2),
    _row("PEANuT", "PeanutConfig", r=4),
    _row("Super tuning", "SupertuningConfig", sparsity=0.9),
    _row("UniLoRA", "UniLoraConfig", r=4, theta_d_length=64),
    _row("TinyLoRA", "TinyLoraConfig", r=2, u=8),
    _row("GLoRA", "GloraConfig", r=4),
    _row("FRoD", "FrodConfig", _SQUARE, progressbar=False),
    _row("PVeRA", "PveraConfig", r=8),
    _row("AdaMSS", "AdamssConfig", r=16, num_subspaces=2),
    Row("Poly", "PolyConfig", lambda family: {"r": 4, "n_tasks": 2}, inputs=_TASKS),
    Row(
        "X-LoRA",
        "XLoraConfig",
        lambda family: {"hidden_size": 64, "adapters": _experts(family)[1]},
        None,
    ),
    _row("Shadow", "ShadowConfig", None, r=4),
    Row(
        "adaption prompt",
        "AdaptionPromptConfig",
        lambda family: {"adapter_len": 4, "adapter_layers": 3},
        None,
    ),
    _row("prompt tuning", "PromptTuningConfig", None, num_virtual_tokens=4),
    _row("P-tuning", "PromptEncoderConfig", None, num_virtual_tokens=4, encoder_hidden_size=32),
    _row("prefix tuning", "PrefixTuningConfig", None, num_virtual_tokens=4),
    _row(
        "CPT",
        "CPTConfig",
        None,
        cpt_token_ids=[1, 2, 3, 4],
        cpt_tokens_type_mask=[1, 2, 3, 4],
        cpt_mask=[1, 1, 1, 1],
    ),
    Row(
        "multitask prompt tuning",
        "MultitaskPromptTuningConfig",
        lambda family: {"num_virtual_tokens": 4, "num_tasks": 2},
        None,
        _TASKS,
    ),
    _row("Cartridge", "CartridgeConfig", None, num_virtual_tokens=4),
    _row("trainable tokens", "TrainableTokensConfig", None, token_indices=[3, 5]),
)
"""The rows, in the order of the table."""
