"""A digest that tells whether client and trunk hold the same middle blocks."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from shared.models.checkpoint import Checkpoint
from shared.models.split_range import SplitRange
from shared.tensor_bytes import as_bytes

# What changes the blocks' function without changing their tensors. An explicit list, because the
# set of all configuration fields differs between transformers versions. How much of a head is
# rotated stands in rope_parameters, which blocks have a sliding window in layer_types.
_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "activation_function",
    "hidden_act",
    "hidden_activation",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "rms_norm_eps",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "attention_bias",
    "mlp_bias",
    "qk_layernorm",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
    "use_parallel_residual",
    "max_position_embeddings",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)


def weight_digest(checkpoint: Checkpoint, split: SplitRange) -> str:
    """SHA-256 over the trunk's tensors as stored, its split and what else fixes its function.

    The tensors are hashed in their stored dtype, so the digest does not depend on the dtype a trunk
    computes in, and is the same for a whole checkpoint and for its split layout.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_described(checkpoint, split), sort_keys=True).encode())
    for name in checkpoint.layer_names(split):
        tensor = checkpoint.read(name)
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def client_digest(checkpoint: Checkpoint, split: SplitRange) -> str | None:
    """The digest a client expects of its trunk; None where it cannot know.

    A client with the whole checkpoint computes it; one with a split layout reads it from the
    metadata of its parts, or from the configuration that was saved with trained ends.
    """
    stated = {m.get("weight_digest") for m in checkpoint.metadata.values()}
    stated.discard(None)
    if checkpoint.layer_names(split) and "ends" not in checkpoint.metadata:
        return weight_digest(checkpoint, split)
    return str(stated.pop()) if len(stated) == 1 else None


def _described(checkpoint: Checkpoint, split: SplitRange) -> dict[str, Any]:
    config = checkpoint.config.to_dict()
    fields = {name: config[name] for name in _CONFIG_FIELDS if config.get(name) is not None}
    return {"split": str(split), "config": fields}
