"""The three parts of a split model, on Hugging Face's own forward.

A part is the family's base model built from a trimmed configuration. Modules that another part
holds are replaced by stand-ins. Masks, rotary embeddings, caches, attention kernels and gradient
checkpointing stay Hugging Face's code.

Dimension letters: B batch, T tokens, D model dimension, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from shared.errors import SplitError
from shared.models.families import FAMILIES, HEAD, Family
from shared.models.loading import load_part
from shared.models.stand_ins import AbsentEmbedding, GlobalLayers, ZeroEmbedding


def total_layers(config: PreTrainedConfig) -> int:
    """Number of blocks of the whole model, also from a part's own configuration."""
    return int(getattr(config, "split_num_layers", None) or config.num_hidden_layers)


def part_config(config: PreTrainedConfig, role: str, start: int, end: int) -> PreTrainedConfig:
    """Returns a copy of the whole model's configuration trimmed to blocks ``start .. end - 1``."""
    trimmed = copy.deepcopy(config)
    trimmed.num_hidden_layers = end - start
    if getattr(trimmed, "layer_types", None):
        trimmed.layer_types = list(config.layer_types[start:end])
    trimmed.split_role = role
    trimmed.split_start_layer, trimmed.split_end_layer = start, end
    trimmed.split_num_layers = total_layers(config)
    trimmed.tie_word_embeddings = False
    return trimmed


class ModelPart:
    """What bottom, trunk and top have in common; mixed into the family's ``PreTrainedModel``."""

    role: ClassVar[str]
    family: ClassVar[Family]

    def __init__(self, config: PreTrainedConfig, start_layer: int, end_layer: int) -> None:
        if getattr(config, "split_role", None) is None:
            _check_range(self.role, start_layer, end_layer, config.num_hidden_layers)
            config = part_config(config, self.role, start_layer, end_layer)
        super().__init__(config)  # type: ignore[call-arg]
        self.loss_type = "ForCausalLM"  # transformers derives it from the names of whole models
        base = self.family.base_class(config)
        _use_global_names(base, self.family, config.split_start_layer)
        _replace_absent_modules(base, self.family, self.role)
        setattr(self, self.family.base, base)
        if self.role == "top":
            bias = self.family.head_bias
            setattr(self, HEAD, nn.Linear(config.hidden_size, config.vocab_size, bias=bias))
        self.post_init()  # type: ignore[attr-defined]

    @property
    def base(self) -> Any:
        """The family's base model inside this part."""
        return getattr(self, self.family.base)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, or its stand-in outside the bottom."""
        embedding: nn.Module = getattr(self.base, self.family.embedding)
        return embedding

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, which only the top has."""
        return getattr(self, HEAD, None)

    @classmethod
    def from_pretrained(cls, model: Any, **kwargs: Any) -> Any:
        """Loads only this part's tensors from a whole or a split checkpoint.

        Arguments are those of :func:`shared.models.loading.load_part`, which this calls.
        """
        return load_part(cls, model, **kwargs)

    @classmethod
    def for_range(cls, config: PreTrainedConfig, start: int, end: int) -> Any:
        """Builds this part for blocks ``start .. end - 1``, whatever its constructor takes."""
        return cls(config, start, end)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | CausalLMOutputWithPast:
        """Runs this part's blocks.

        Args:
            input_ids: Token ids [B, T] for the bottom; hidden states [B, T, D] are taken here too,
                because PEFT passes a model's first argument under this name.
            attention_mask: As for the whole model: [B, S] of zeros and ones, or [B, 1, T, S].
            position_ids: [B, T] positions; None counts from the cache's length.
            past_key_values: A cache of this part alone.
            inputs_embeds: Hidden states [B, T, D] from the part below.
            labels: [B, T] token ids, -100 ignored; top only, shifted inside as transformers does.
            use_cache: Pass False in training: the default builds a cache.
            logits_to_keep: Top only: compute logits of the last positions alone; 0 means all.
            return_dict: Ignored, answers are always dict-like.
            output_attentions: Not supported across parts, ignored.
            output_hidden_states: Not supported across parts, ignored.
            **kwargs: Passed to the family's forward.

        Returns:
            ``last_hidden_state`` [B, T, D] from bottom and trunk; ``logits`` [B, T, V] and, given
            labels, ``loss`` from the top.
        """
        if input_ids is not None and torch.is_floating_point(input_ids):
            input_ids, inputs_embeds = None, input_ids
        loss_kwargs = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        output = self.base(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        if self.role != "top":
            return BaseModelOutputWithPast(
                last_hidden_state=output.last_hidden_state, past_key_values=output.past_key_values
            )
        return self._head(output, labels, logits_to_keep, loss_kwargs)

    def _head(
        self,
        output: Any,
        labels: torch.Tensor | None,
        logits_to_keep: int,
        loss_kwargs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        hidden_BTD = output.last_hidden_state[:, -logits_to_keep:]  # -0 keeps all positions
        logits_BTV = _softcapped(getattr(self, HEAD)(hidden_BTD), self.config)  # type: ignore[attr-defined]
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size  # type: ignore[attr-defined]
            loss = self.loss_function(  # type: ignore[attr-defined]
                logits=logits_BTV, labels=labels, vocab_size=vocab_size, **loss_kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, past_key_values=output.past_key_values
        )


def _softcapped(logits_BTV: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """What Gemma 2 does behind its head; other families' configurations have no such cap."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits_BTV if cap is None else torch.tanh(logits_BTV / cap) * cap


def _check_range(role: str, start: int, end: int, num_layers: int) -> None:
    if not 0 <= start < end <= num_layers:
        raise SplitError(
            f"the {role} cannot hold blocks {start} .. {end - 1}: the model has {num_layers} blocks"
        )


def _use_global_names(base: nn.Module, family: Family, start: int) -> None:
    layers = list(getattr(base, family.layers))
    for local_index, layer in enumerate(layers):
        family.fix_layer(layer, local_index, start + local_index)
    named = ((str(start + i), layer) for i, layer in enumerate(layers))
    setattr(base, family.layers, GlobalLayers(named))


def _replace_absent_modules(base: nn.Module, family: Family, role: str) -> None:
    if role != "bottom":
        setattr(base, family.embedding, AbsentEmbedding())
        for name in family.zeroed:
            setattr(base, name, ZeroEmbedding())
        for name in family.identity:
            setattr(base, name, nn.Identity())
    if role != "top":
        setattr(base, family.norm, nn.Identity())


def part_class(model_type: str, role: str) -> Any:
    """Makes the class of one part of one family, a ``PreTrainedModel`` that PEFT can wrap.

    ``GenerationMixin`` is there because PEFT's causal-LM task type asks for
    ``prepare_inputs_for_generation``.
    """
    family = FAMILIES[model_type]
    prefix = family.class_prefix
    return type(
        f"{prefix}{role.title()}Model",
        (ModelPart, family.pretrained_class, GenerationMixin),
        {
            "__doc__": f"The {role} of a split {prefix} model.",
            "__module__": __name__,
            "role": role,
            "family": family,
            "config_class": family.pretrained_class.config_class,
            "base_model_prefix": family.base,
            "_tied_weights_keys": None,
        },
    )
