"""The model families that can be split: a new one is one row in ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.gemma.modeling_gemma import (
    GemmaForCausalLM,
    GemmaModel,
    GemmaPreTrainedModel,
)
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma2PreTrainedModel,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)
from transformers.models.mistral.modeling_mistral import (
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
)
from transformers.models.phi.modeling_phi import PhiForCausalLM, PhiModel, PhiPreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
)

from shared.errors import CheckpointError

HEAD = "lm_head"
"""Attribute of every family's language-model head."""

_LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

LayerFix = Callable[[nn.Module, int, int], None]


def _keep(layer: nn.Module, local_index: int, global_index: int) -> None:
    """Most families never look at a block's index but for its cache slot."""


def _rescale_gpt2_attention(layer: Any, local_index: int, global_index: int) -> None:
    # The one place where GPT-2 computes with a block's index; blocks are built with their local
    # index (it names the cache slot), so the scale is made that of the global one.
    if layer.attn.scale_attn_by_inverse_layer_idx:
        attention = layer.attn
        unscaled = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
        attention.scaling = unscaled / float(global_index + 1)


@dataclass(frozen=True)
class Family:
    """How the parts of one transformers model family are named.

    The attribute names are those of the family's classes in ``transformers``, so a key of a
    checkpoint is ``{base}.{layers}.{global index}. …`` in the whole model and in every part.
    The defaults are Llama's, which most families share.
    """

    model_type: str
    full_class: Any
    base_class: Any
    pretrained_class: Any
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    linear_layers: tuple[str, ...] = _LLAMA_LINEAR
    """Names of the blocks' linear layers: what LoRA targets unless told otherwise."""
    zeroed: tuple[str, ...] = ()
    """Modules whose output is added to the embeddings: nothing is added outside the bottom."""
    identity: tuple[str, ...] = ()
    """Modules applied right after the embeddings: skipped outside the bottom."""
    fix_layer: LayerFix = _keep
    head_bias: bool = False
    stored_head: str = HEAD
    """What checkpoint files call the language-model head; ``lm_head`` is read as well."""

    @property
    def class_prefix(self) -> str:
        """What the names of the family's classes begin with, as in ``GPT2``."""
        name: str = self.pretrained_class.__name__
        return name.removesuffix("PreTrainedModel")

    @property
    def learns_positions(self) -> bool:
        """Whether positions are rows of a table, which has an end; others are computed."""
        return bool(self.zeroed)

    @property
    def embedding_key(self) -> str:
        """Checkpoint key of the token embedding."""
        return f"{self.base}.{self.embedding}.weight"

    @property
    def layer_prefix(self) -> str:
        """What the checkpoint keys of all blocks begin with."""
        return f"{self.base}.{self.layers}."


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            GPT2LMHeadModel,
            GPT2Model,
            GPT2PreTrainedModel,
            base="transformer",
            layers="h",
            embedding="wte",
            norm="ln_f",
            linear_layers=("c_attn", "c_fc", "c_proj"),
            zeroed=("wpe",),
            identity=("drop",),
            fix_layer=_rescale_gpt2_attention,
        ),
        Family(
            "gpt_neox",
            GPTNeoXForCausalLM,
            GPTNeoXModel,
            GPTNeoXPreTrainedModel,
            base="gpt_neox",
            embedding="embed_in",
            norm="final_layer_norm",
            linear_layers=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
            identity=("emb_dropout",),
            stored_head="embed_out",
        ),
        Family(
            "phi",
            PhiForCausalLM,
            PhiModel,
            PhiPreTrainedModel,
            norm="final_layernorm",
            linear_layers=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
            identity=("embed_dropout",),
            head_bias=True,
        ),
        Family("llama", LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel),
        Family("mistral", MistralForCausalLM, MistralModel, MistralPreTrainedModel),
        Family("qwen2", Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel),
        Family("qwen3", Qwen3ForCausalLM, Qwen3Model, Qwen3PreTrainedModel),
        # Gemma's embedding module scales its own output, so hidden states are never scaled again.
        Family("gemma", GemmaForCausalLM, GemmaModel, GemmaPreTrainedModel),
        Family("gemma2", Gemma2ForCausalLM, Gemma2Model, Gemma2PreTrainedModel),
    )
}


def family_of(model_type: str) -> Family:
    """Returns the row of a model type.

    Raises:
        CheckpointError: If the family cannot be split yet; names those that can.
    """
    if model_type not in FAMILIES:
        accepted = ", ".join(FAMILIES)
        raise CheckpointError(f"model type {model_type!r} cannot be split; accepted: {accepted}")
    return FAMILIES[model_type]
