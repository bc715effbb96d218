"""Blocks with NF4 or int8 linear layers, by bitsandbytes and as transformers makes them.

``from_pretrained(…, quantization_config=BitsAndBytesConfig(…))`` quantises a whole model while it
reads the checkpoint. Parts are read by our own loader, so what transformers does to each layer is
done here to a loaded part, with transformers' own helpers: the results are the same to the bit.

NF4 is that of QLoRA (https://arxiv.org/abs/2305.14314), int8 that of LLM.int8()
(https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from shared.errors import QuantizationError
from shared.models.families import family_of

QUANTIZATIONS = ("nf4", "int8")
_NOT_INSTALLED = "quantisation needs bitsandbytes: pip install trunkline[quant]"


def quantize(module: Any, kind: str) -> Any:
    """Replaces the linear layers of the blocks, in place; head, embeddings and norms stay.

    Do it where the model will run and before an adapter is added: the weights are read from their
    present device, and layers that were quantised cannot be moved with ``module.to``.

    Args:
        module: A part or the client's model with a hole, loaded, in floating point.
        kind: One of ``QUANTIZATIONS``.

    Returns:
        The same module; its quantised weights are frozen, and PEFT will wrap them as such.

    Raises:
        QuantizationError: If the kind is unknown, bitsandbytes is not installed, or the blocks have
            no linear layer in floating point.
    """
    check_kind(kind)
    bnb = _bitsandbytes()
    family = family_of(module.config.model_type)
    prefix = f"{family.base}.{family.layers}"
    layers = module.get_submodule(prefix)
    plain = {name: m for name, m in layers.named_modules() if _is_plain_linear(m)}
    if not plain:
        raise QuantizationError(f"{type(module).__name__}: no linear layers to quantise to {kind}")
    config = _config(kind, next(iter(plain.values())).weight.dtype)
    _replace(layers, config)
    convert = AutoHfQuantizer.from_config(config, pre_quantized=False).get_quantize_ops().convert
    for name in list(plain):
        _fill(module, f"{prefix}.{name}", plain.pop(name), convert)
    # What transformers sets and PEFT reads to choose its bitsandbytes layers.
    setattr(module, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    return _make_ready(module, bnb)


def prepare_loaded(module: Any) -> Any:
    """Makes a model that transformers quantised itself compute as ours do, in place.

    On a CPU with AVX512-BF16 a 4-bit layer otherwise repacks its weights on the first forward in
    evaluation mode, for a kernel in bfloat16 that autograd does not see.

    Args:
        module: The result of ``from_pretrained`` with a ``BitsAndBytesConfig``.

    Returns:
        The same model.

    Raises:
        QuantizationError: If bitsandbytes is not installed.
    """
    return _make_ready(module, _bitsandbytes())


def check_kind(kind: str) -> None:
    """Refuses what is not a quantisation, or cannot be done here.

    Raises:
        QuantizationError: Names those accepted, or what is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise QuantizationError(
            f"quantization {kind!r} is not known; accepted: {', '.join(QUANTIZATIONS)}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise QuantizationError(_NOT_INSTALLED)


def shared_tensors(module: nn.Module) -> list[Any]:
    """Lists what copies of a model can share: fill ``deepcopy``'s memo with these.

    Besides parameters and buffers a quantised layer keeps its scales in plain attributes, which
    ``copy.deepcopy`` would copy. The objects listed are only ever read by a forward; a layer's
    ``MatmulLtState`` is not among them, since every forward writes into it.
    """
    found: list[Any] = [*module.parameters(), *module.buffers()]
    for layer in module.modules():
        state = getattr(layer, "state", None)
        scales = (getattr(state, "CB", None), getattr(state, "SCB", None))
        found.extend(s for s in (*scales, getattr(layer, "quant_state", None)) if s is not None)
    return found


def dequantized(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The numbers that a layer's weight stands for; the layer is not changed.

    PEFT's own ``dequantize_module_weight`` moves the state of an int8 layer, which is shared here.
    """
    if getattr(weight, "quant_state", None) is not None:
        return _bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined, no-any-return]
    if weight.dtype is torch.int8:
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return _bitsandbytes().functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]
    return weight


def transposed(module: nn.Module) -> bool:
    """Tells what PEFT's ``fan_in_fan_out`` must be: whether linear layers are still ``Conv1D``."""
    return any(isinstance(m, Conv1D) for m in module.modules())


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise QuantizationError(_NOT_INSTALLED) from error


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or type(module) is nn.Linear


def _config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _replace(layers: nn.Module, config: BitsAndBytesConfig) -> None:
    """Puts empty quantised layers in the place of the others."""
    # Here, because that module imports bitsandbytes, which is optional and slow to import.
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    replace_with_bnb_linear(layers, quantization_config=config)


def _fill(module: Any, name: str, plain: Any, convert: Any) -> None:
    """Gives an empty quantised layer the weight and the bias of the layer it replaced."""
    layer = module.get_submodule(name)
    key = f"{name}.weight"
    layer.weight = convert({key: plain.weight.detach()}, model=module, full_layer_name=key)[key]
    layer.bias = plain.bias
    layer.train(plain.training)


def _make_ready(module: Any, bnb: Any) -> Any:
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_the_cast_notice)
    for layer in module.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, bnb.nn.Linear8bitLt) and layer.weight.CB is not None:
            # Otherwise the first forward moves the scales out of the weight and into the state of
            # one copy; the others, which share the weight, would quantise its integers again.
            layer.init_8bit_state()
    return module


def _is_not_the_cast_notice(record: logging.LogRecord) -> bool:
    # Said by every int8 layer in every forward in evaluation mode.
    return "will be cast from" not in str(record.msg)
