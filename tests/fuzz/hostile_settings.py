"""Ill-meant numbers, adapters, values, versions and questions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftType

from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.fuzz.valid import END, HEADS, HIDDEN_SIZE, START, Sequence, push_of

_WHOLE = (0, 1, 2, 3, 64, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_REAL = (0.0, -0.0, 1.0, 0.5, 0.999, 2.0, -1.0, 1e-300, 1e-38, 1e38, 1e39, 1e300, 1.7e308,
         float("inf"), float("-inf"), float("nan"))  # fmt: skip
_WORDS = (
    "", "x", "c_attn", ".*", "(", "[", "(?P<a>x)", "\\", "all", "all-linear", "os", "os.system",
    "\0", "0", "pissa", "gaussian", "True", "none", "lora_only", "default", "__base__", "__class__",
    "forward", "weight", "a.b", "../x", "/etc/passwd", "é", "Q" * 5000,
)  # fmt: skip
_MODULES = (
    "transformer.h.3.attn.c_attn", "transformer.h.9.mlp.c_fc", "transformer.h.3.mlp.c_proj",
    "transformer.h.3.attn", "transformer.h.3", "transformer.h.3.ln_1", "transformer.h.3.mlp.act",
    "transformer.h.1.attn.c_attn", "transformer.h.10.attn.c_attn", "transformer.h.99.attn.c_attn",
    "transformer.h", "transformer", "transformer.wte", "lm_head", "h.3.attn.c_attn", "c_attn",
    "transformer.h.3.attn.c_attn.lora_A", "transformer.h.3.attn.c_attn.base_layer",
    "transformer.h.3.attn.c_attn.", ".transformer.h.3.attn.c_attn", "transformer..h.3", *_WORDS,
)  # fmt: skip
_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "use_rslora",
    "use_dora", "init_lora_weights", "fan_in_fan_out", "bias", "target_r", "init_r", "tinit",
    "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "feedforward_modules",
    "init_ia3_weights", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers",
    "encoder_hidden_size", "prefix_projection", "inference_mode", "task_type", "peft_type",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "layer_replication",
    "trainable_token_indices", "target_parameters", "runtime_config", "auto_mapping", "revision",
    "base_model_name_or_path", "num_transformer_submodules", "corda_config", "qalora_group_size",
    "use_qalora", "lora_bias", "arrow_config", "alora_invocation_tokens", "projection_prng_key",
    "save_projection", "d_initial", "module_dropout", "rank_dropout", "use_effective_conv2d",
    "oft_block_size", "boft_block_size", "n_frequency", "random_loc_seed", "", "\0", "é",
)  # fmt: skip


def whole(rng: random.Random) -> int:
    """A number at the edge of what a field can hold."""
    return max(0, min(2**64 - 1, rng.choice(_WHOLE) + rng.choice((0, 0, -1, 1))))


def real(rng: random.Random) -> float:
    """A floating-point number at the edge."""
    return rng.choice(_REAL)


def bad_structures(built: Sequence) -> None:
    """Adapters that PEFT would choke on, or that mean more than the tenant's own layers."""
    for _ in range(3):
        state, tensors = _copied(built)
        for _ in range(built.rng.choice((1, 1, 2, 4))):
            _harm(state.structure, built.rng)
        _push(built, state, tensors)
        built.backward()


def bad_values(built: Sequence) -> None:
    """Tensors of other names, shapes, types or numbers than the adapter's; or none."""
    rng = built.rng
    for _ in range(3):
        state, tensors = _copied(built)
        for _ in range(rng.choice((1, 1, 2, 4))):
            _harm_value(state, tensors, rng)
        _push(built, state, tensors)
        built.backward()
    built.train_step()


def bad_versions(built: Sequence) -> None:
    """Versions that go back, stand still or never were."""
    rng = built.rng
    for _ in range(5):
        state, tensors = _copied(built)
        if rng.random() < 0.4:
            state.ClearField("structure")
        state.version = rng.choice((0, 1, built.version, built.version + 1, whole(rng)))
        state.since = rng.choice((0, 0, 1, built.version, whole(rng)))
        meant = rng.choice((state.version, state.version, built.version, whole(rng)))
        body = pb.Forward(state_version=meant, state=state)
        built.send(pb.SessionRequest(forward=body), built.inputs((1, 2, HIDDEN_SIZE)) | tensors)
        if rng.random() < 0.5:
            body = pb.Forward(state_version=meant)
            built.send(pb.SessionRequest(forward=body), built.inputs((1, 2, HIDDEN_SIZE)))
    built.train_step()


def bad_opens(built: Sequence) -> None:
    """Terms of a session that are none."""
    rng = built.rng
    built.frames.clear()
    for _ in range(2):
        versions = {
            rng.choice(("peft", "torch", "", "\0")): rng.choice((*_WORDS, "0.21", "9" * 99))
        }
        built.open(
            weight_digest=rng.choice(("", "", "0" * 64, *_WORDS)),
            start_layer=rng.choice((START, START, 0, 2**32 - 1)),
            end_layer=rng.choice((END, END, 0, 2**32 - 1)),
            resume_session_id=rng.choice(("", "", "", *_WORDS)),
            epoch=rng.choice((0, 0, whole(rng))),
            **({"library_versions": versions} if rng.random() < 0.3 else {}),
        )
    built.train_step()


def bad_forwards(built: Sequence) -> None:
    """Forwards whose ways to compute are none."""
    rng = built.rng
    built.train_step()
    for _ in range(4):
        body = pb.Forward(
            request_id=rng.choice(("", "f", "f", "g")),
            keep_graph=rng.random() < 0.5,
            training=rng.random() < 0.7,
            state_version=rng.choice((built.version, built.version, whole(rng))),
            cache_id=rng.choice(("", "", "", "c")),
            answer_format=_any_enum(rng),
            adapter_names=[rng.choice(_WORDS) for _ in range(rng.choice((0, 0, 1, 2, 3)))],
            attention=rng.choice(("", "sdpa", "eager", "flash_attention_2", *_WORDS)),
            autocast=_any_enum(rng),
            dropout_key=bytes(rng.choice((0, 31, 32, 32, 33, 5000))),
        )
        if rng.random() < 0.2:
            body.cached_tokens = whole(rng)
        tensors = built.inputs((2, 3, HIDDEN_SIZE))
        if rng.random() < 0.4:
            size = rng.choice(((2, HEADS, 3, HIDDEN_SIZE // HEADS), (2, HEADS, 0, 16), (1, 1, 1, 1),
                               (2, HEADS, 130, 16), (2,), ()))  # fmt: skip
            kind = rng.choice((torch.float32, torch.float32, torch.int64, torch.bool))
            numbers = rng.choice((range(16), range(15), range(16), [0], [5], range(1, 17)))
            tensors |= {f"past/{i}": torch.zeros(size, dtype=kind) for i in numbers}
        built.send(pb.SessionRequest(forward=body), tensors)


def bad_backwards(built: Sequence) -> None:
    """Gradients that nobody has, of what was never sent, and again after the last."""
    rng = built.rng
    state, _ = push_of(built.kind)
    known = [value.names[0] for value in state.values]
    for _ in range(4):
        built.forward(request_id=f"b{rng.randrange(2)}")
        names = [rng.choice((*known, *known, *_MODULES)) for _ in range(rng.randrange(5))]
        body = pb.Backward(
            request_id=f"b{rng.randrange(3)}",
            need_input_gradient=rng.random() < 0.5,
            values=names * rng.choice((1, 1, 2, 300)),
            past=[rng.choice((0, 1, 16, 2**32 - 1)) for _ in range(rng.choice((0, 0, 1, 3)))],
            keep_graph=rng.random() < 0.5,
            answer_format=_any_enum(rng),
            value_format=_any_enum(rng),
        )
        shape = rng.choice(((1, 1, HIDDEN_SIZE), (2, 6, HIDDEN_SIZE), (1, 3, HIDDEN_SIZE), ()))
        gradient = _filled(torch.zeros(shape), real(rng))
        for _ in range(2):
            built.send(pb.SessionRequest(backward=body), {"gradient": gradient})


def bad_fetches(built: Sequence) -> None:
    """Questions for weights that are not given, or are not there."""
    rng = built.rng
    for _ in range(4):
        names = [f"{rng.choice(_MODULES)}{rng.choice(('', '.weight', '.bias'))}" for _ in range(3)]
        body = pb.Fetch()
        for field in rng.sample((body.names, body.norm_rows, body.norm_columns), 2):
            field.extend(names * rng.choice((1, 1, 2, 1000)))
        built.send(pb.SessionRequest(fetch=body))


def _copied(built: Sequence) -> tuple[pb.AdapterState, dict[str, torch.Tensor]]:
    state, tensors = push_of(built.kind)
    copied = pb.AdapterState()
    copied.CopyFrom(state)
    return copied, dict(tensors)


def _push(built: Sequence, state: pb.AdapterState, tensors: dict[str, torch.Tensor]) -> None:
    built.version += 1
    state.version = built.version
    state.since = built.version - 1 if built.rng.random() < 0.2 else 0
    body = pb.Forward(state_version=built.version, state=state, training=True)
    body.dropout_key = bytes(32)
    if built.rng.random() < 0.5:
        body.request_id, body.keep_graph = "pushed", True
    built.send(pb.SessionRequest(forward=body), built.inputs((1, 2, HIDDEN_SIZE)) | tensors)


def _harm(structure: pb.Structure, rng: random.Random) -> None:
    """Makes one thing of a structure another."""
    spec, layer = rng.choice(structure.adapters), rng.choice(structure.layers)
    names = rng.choice((spec.target_modules, spec.feedforward_modules, spec.modules_to_save))
    match rng.randrange(14):
        case 0:
            spec.name = rng.choice(_WORDS)
        case 1 | 2:
            spec.peft_type = rng.choice((*(kind.value for kind in PeftType), *_WORDS))
        case 3 | 4:
            names.append(rng.choice((*_MODULES, *names)))
        case 5:
            del names[rng.randrange(len(names) + 1) :]
        case 6:
            where = rng.choice((spec.ranks, spec.alphas))
            where[rng.choice(_MODULES)] = min(whole(rng), 2**32 - 1)
        case 7 | 8 | 9:
            spec.settings[rng.choice((*spec.settings, *_FIELDS))].CopyFrom(_setting(rng))
        case 10:
            structure.adapters.append(spec)
            structure.adapters[-1].name = rng.choice((spec.name, "other", "a" * 64, "a" * 65))
        case 11:
            layer.module = rng.choice(_MODULES)
        case 12:
            layer.active[:] = [rng.choice((*_WORDS, spec.name)) for _ in range(rng.randrange(3))]
            layer.disabled = rng.random() < 0.5
            layer.scaling[rng.choice((*_WORDS, spec.name))] = real(rng)
            layer.outside[rng.choice(_WORDS)] = rng.choice(_WORDS)
        case _:
            layer.dropout = real(rng)
            if rng.random() < 0.3:
                structure.layers.append(layer)


def _setting(rng: random.Random) -> pb.Setting:
    integer = rng.choice((-1, 1)) * min(whole(rng), 2**63 - 1)
    return rng.choice((
        pb.Setting(), pb.Setting(flag=True), pb.Setting(flag=False), pb.Setting(integer=integer),
        pb.Setting(integer=integer), pb.Setting(real=real(rng)),
        pb.Setting(word=rng.choice(_WORDS)),
    ))  # fmt: skip


def _harm_value(
    state: pb.AdapterState, tensors: dict[str, torch.Tensor], rng: random.Random
) -> None:
    """Makes one thing of the values another."""
    number = rng.randrange(len(state.values))
    value, key = state.values[number], f"value/{number}"
    tensor = tensors.get(key, torch.zeros(2))
    match rng.randrange(9):
        case 0:
            value.names[:] = [
                rng.choice((*value.names, *_MODULES)) for _ in range(rng.randrange(4))
            ]
        case 1:
            base = rng.choice(("attn.c_attn.weight", "attn.c_attn.bias", "ln_1.weight", "x"))
            value.names[:] = [f"transformer.h.{rng.randrange(12)}.{base}"]
        case 2:
            value.names.extend(rng.choice(state.values).names)
        case 3:
            value.requires_grad = not value.requires_grad
        case 4:
            value.is_buffer = not value.is_buffer
        case 5:
            tensors.pop(key, None)
        case 6:
            tensors[rng.choice((key, "value/", "value/x", "value/-1", "value/99999", "x"))] = tensor
        case 7:
            tensors[key] = _filled(tensor, real(rng))
        case _:
            tensors[key] = rng.choice((
                torch.zeros(()), torch.zeros(0), torch.zeros(1, dtype=torch.bool),
                tensor.reshape(-1)[:1], tensor.to(torch.int64), tensor.to(torch.float64),
                tensor.to(torch.bfloat16), torch.zeros(1, *tensor.shape),
            ))  # fmt: skip


def _any_enum(rng: random.Random) -> Any:
    return rng.choice((0, 0, 0, 1, 2, 3, 4, 5, 9, 10, 99, -1, 2**31 - 1))


def _filled(like: torch.Tensor, value: float) -> torch.Tensor:
    # By way of float64, since torch refuses to fill float32 with what does not fit.
    return torch.full(like.shape, value, dtype=torch.float64).to(torch.float32)


SETTINGS_CASES: tuple[Callable[[Sequence], None], ...] = (
    bad_structures, bad_structures, bad_structures, bad_values, bad_values, bad_values,
    bad_versions, bad_opens, bad_forwards, bad_forwards, bad_backwards, bad_fetches,
)  # fmt: skip
