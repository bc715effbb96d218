"""One standard PEFT adapter out of whatever training left, and the model with it merged in.

Everything that is written is read again and compared before the folder gets its name.

Dimension letters: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer

from client_service.adapter_files import (
    Weights,
    adapter_weights,
    load_adapter_weights,
    read_adapter,
    write_adapter,
)
from client_service.adapter_source import FoundAdapter, find_adapter
from client_service.by_peft import by_peft
from client_service.whole import largest_difference, load_whole
from shared.errors import AdapterError, CheckpointError
from shared.models import open_checkpoint
from shared.models.checkpoint import WEIGHT_FILES
from shared.models.tensor_files import first_line
from shared.new_folder import check_new, new_folder

MERGED = "merged"
MERGE_TOLERANCE = 1e-4
"""Largest difference of a logit between the merged model and the base with its adapter.

For logits up to 10; where they are larger, float32 rounds them more coarsely, in proportion.
"""

_PROBE_BATCH, _PROBE_TOKENS = 2, 16


@dataclass(frozen=True)
class Exported:
    """What was written and how it was checked."""

    adapter: str
    source: str
    """Where the adapter was found in what was named."""
    kind: str
    """What was named: an adapter, a Trainer's checkpoint or output, a training run, parts."""
    method: str
    base_model: str
    tensors: int
    parameters: int
    max_abs_reread_diff: float
    """Of a weight, between what was found and what is read again: 0."""
    max_abs_peft_logit_diff: float | None
    """Between plain PEFT with what was found and with the export; None without the base model."""
    merged: str | None
    max_abs_merged_logit_diff: float | None
    """Between the merged model, read again, and the base model with its adapter."""

    def as_dict(self) -> dict[str, Any]:
        """The facts by name."""
        return asdict(self)


def export(
    checkpoint: str | Path, out: str | Path, merge: bool = False, model: str = ""
) -> Exported:
    """Writes one PEFT adapter of the whole model, and the merged model if asked.

    Args:
        checkpoint: A folder that :func:`find_adapter` finds an adapter in.
        out: New folder; the merged model goes to ``merged/`` in it, in float32.
        merge: Writes the base model with the adapter merged in.
        model: Folder or hub id of the base model; default: what the adapter says.

    Returns:
        What was written; every comparison held.

    Raises:
        AdapterError: If there is no readable adapter, the method cannot be merged, or what was
            written is not what was found; nothing is left then.
        CheckpointError: If ``out`` is not new, or the base model is needed and not there.
    """
    out = Path(out)
    check_new(out)
    found = find_adapter(Path(checkpoint), model)
    if merge:
        _check_mergeable(found)
    base = _base_at_hand(found.base, needed=merge or bool(model))
    expected = None if base is None else _logits(_with_found(base, found))
    peft_diff, merged_diff = None, None
    with new_folder(out) as folder:
        write_adapter(folder, found.config, found.weights, found.base)
        reread_diff = largest_difference(found.weights, read_adapter(folder)[1])
        if reread_diff != 0:
            raise AdapterError(f"{out}: reads back other weights than were written")
        if base is not None and expected is not None:
            adapted = _with_exported(base, folder, found.weights)
            peft_diff = _difference(expected, _logits(adapted))
            if peft_diff != 0:
                raise AdapterError(
                    f"{found.folder}: plain PEFT gives other logits with the exported adapter, by "
                    f"{peft_diff:.1e}"
                )
            if merge:
                merged_diff = _merge(adapted, expected, found, folder / MERGED)
    return Exported(
        adapter=str(out),
        source=str(found.folder),
        kind=found.kind,
        method=found.config.peft_type.value,
        base_model=found.base,
        tensors=len(found.weights),
        parameters=sum(weight.numel() for weight in found.weights.values()),
        max_abs_reread_diff=reread_diff,
        max_abs_peft_logit_diff=peft_diff,
        merged=str(out / MERGED) if merge else None,
        max_abs_merged_logit_diff=merged_diff,
    )


def _check_mergeable(found: FoundAdapter) -> None:
    if found.config.is_prompt_learning:
        raise AdapterError(
            f"{found.config.peft_type.value} cannot be merged: it puts virtual tokens "
            f"before the input and changes no weight; export without --merge, and load with PEFT"
        )
    if not found.base:
        raise AdapterError(f"{found.folder}: says no base model; name it with --model")


def _base_at_hand(base: str, needed: bool) -> str | None:
    """The base model if it is needed or lies on this machine; nothing is fetched unasked.

    Raises:
        CheckpointError: If it is needed and is not a whole model.
    """
    here = Path(base, "config.json").is_file() if base else False
    if not needed and not here and not any(_is_cached(base, name) for name in WEIGHT_FILES):
        return None
    if open_checkpoint(base).metadata:
        raise CheckpointError(f"{base}: holds parts; accepted is a whole model's folder or hub id")
    return base


def _is_cached(repo: str, name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(repo, name), str)
    except ValueError:  # a folder that is gone is no hub id either
        return False


def _with_found(base: str, found: FoundAdapter) -> Any:
    """The base model with the adapter as it was found."""
    if not found.joined:
        return _by_peft(base, found.folder)
    with by_peft(f"{found.folder}: PEFT cannot put its parts together"):
        model = get_peft_model(_load_base(base), copy.deepcopy(found.config))
    load_adapter_weights(model, found.weights)
    return model.eval()


def _with_exported(base: str, folder: Path, weights: Weights) -> Any:
    """The base model with the exported adapter.

    Raises:
        AdapterError: If PEFT did not take every tensor as it is, or misses one.
    """
    model = _by_peft(base, folder)
    held = adapter_weights(model)
    state = model.state_dict()
    # PEFT keeps trained embeddings among the model's own weights.
    taken = held | {n: state[n] for n in weights.keys() - held.keys() if n in state}
    if odd := sorted(taken.keys() ^ weights.keys()):
        raise AdapterError(
            f"{len(odd)} tensors, such as {odd[0]}, are in the adapter or in the model that plain "
            f"PEFT makes of it on {base}, not in both"
        )
    if largest_difference(taken, weights) != 0:
        raise AdapterError(f"plain PEFT holds other weights on {base} than were exported")
    return model


def _by_peft(base: str, folder: Path) -> Any:
    whole = _load_base(base)
    try:
        with warnings.catch_warnings():
            # What is missing is found and refused by name when the export is loaded.
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            return PeftModel.from_pretrained(whole, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder}: plain PEFT cannot load it on {base} ({first_line(error)})"
        ) from error


def _load_base(base: str | Path) -> Any:
    try:
        return load_whole(base).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{base}: cannot be loaded ({first_line(error)})") from error


def _merge(adapted: Any, expected_BTV: torch.Tensor, found: FoundAdapter, folder: Path) -> float:
    """Merges, writes and reads again; returns the largest difference of a logit."""
    try:
        with warnings.catch_warnings():
            # Where one of two tied weights has an adapter, PEFT unties them, which is right.
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise AdapterError(f"{found.folder}: cannot be merged ({first_line(error)})") from error
    merged.save_pretrained(folder)
    _copy_tokenizer(found, folder)
    difference = _difference(expected_BTV, _logits(_load_base(folder)))
    accepted = MERGE_TOLERANCE * max(1.0, float(expected_BTV.abs().max()) / 10)
    if not difference <= accepted:
        raise AdapterError(
            f"{found.folder}: the merged model's logits are {difference:.1e} from those of the "
            f"base with its adapter; accepted: {accepted:.1e}"
        )
    return difference


def _copy_tokenizer(found: FoundAdapter, folder: Path) -> None:
    """The tokenizer that was saved with the adapter, else the base model's."""
    own = (found.folder / "tokenizer_config.json").is_file()
    source = str(found.folder) if own else open_checkpoint(found.base).folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return  # a base model without a tokenizer is merged all the same
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Logits [B, T, V] of a fixed input."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(config.vocab_size, (_PROBE_BATCH, _PROBE_TOKENS), generator=generator)
    logits_BTV: torch.Tensor = model(input_ids=ids_BT).logits.float()
    return logits_BTV


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
