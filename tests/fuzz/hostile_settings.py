"""Ill-meant numbers, adapter configurations, optimizers and saved states."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch

from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.fuzz.valid import ADAPTERS, END, OPTIMIZERS, START, Sequence

_WHOLE = (0, 1, 2, 3, 64, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_REAL = (0.0, -0.0, 1.0, 0.5, 0.999, 2.0, -1.0, 1e-300, 1e-38, 1e38, 1e39, 1e300, 1.7e308,
         float("inf"), float("-inf"), float("nan"))  # fmt: skip
_ANYTHING: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**6, 2**63, 10**400, 0.5, -0.1, 1e308, float("nan"),
    float("inf"), "", "x", "c_attn", ".*", "(", "[", "(?P<a>x)", "\\", "all", "all-linear", "os",
    "\0", "\ud800", "0", "pissa", "gaussian", [], [[]], [None], ["c_attn"], [0], [-1], [10**30],
    ["c_attn", 1], {}, {"c_attn": 2}, {"c_attn": -1}, {"a": {"b": []}}, {"": ""}, {"0": 0.5},
    {"c_attn": 10**9}, {"c_attn": None}, {"c_attn": [True]}, [["c_attn"]],
)  # fmt: skip
_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "use_rslora",
    "use_dora", "init_lora_weights", "fan_in_fan_out", "bias", "target_r", "init_r", "tinit",
    "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "feedforward_modules",
    "init_ia3_weights", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers",
    "encoder_hidden_size", "prefix_projection", "inference_mode", "task_type", "peft_type",
    "megatron_config", "loftq_config", "eva_config", "layer_replication", "trainable_token_indices",
    "target_parameters", "runtime_config", "auto_mapping", "revision", "base_model_name_or_path",
    "num_transformer_submodules", "corda_config", "qalora_group_size", "lora_bias", "arrow_config",
)  # fmt: skip
_HYPERPARAMETERS = (
    "lr", "weight_decay", "eps", "beta1", "beta2", "momentum", "dampening", "beta2_decay", "d",
    "eps1", "eps2", "clip_threshold", "decay_rate", "lr_decay", "initial_accumulator_value", "rho",
    "momentum_decay", "alpha", "lambd", "t0", "eta1", "eta2", "step_size1", "step_size2", "",
)  # fmt: skip
_FLAGS = ("maximize", "foreach", "amsgrad", "fused", "nesterov", "decoupled_weight_decay",
          "scale_parameter", "relative_step", "warmup_init", "centered", "capturable",
          "differentiable")  # fmt: skip


def whole(rng: random.Random) -> int:
    """A number at the edge of what a field can hold."""
    return max(0, min(2**64 - 1, rng.choice(_WHOLE) + rng.choice((0, 0, -1, 1))))


def real(rng: random.Random) -> float:
    """A floating-point number at the edge."""
    return rng.choice(_REAL)


def hostile_json(rng: random.Random) -> str:
    """An adapter configuration with wrong fields, or a text that is none."""
    deep = rng.choice((10, 900, 5000, 90_000))
    if rng.random() < 0.15:
        texts = ("[" * deep, '{"a":' * deep, "", "null", "1", '"LORA"', "[]", "NaN", "1" * deep,
                 '{"peft_type": "LORA", "r": 1' + "0" * deep + "}", "\0", "{}",
                 '{"peft_type": []}', '{"peft_type": {}}', '{"peft_type": null}',
                 '{"peft_type": "LORA", "peft_type": 1}',
                 "{" + '"r":1,' * deep + '"peft_type":"LORA"}')  # fmt: skip
        return rng.choice(texts)
    fields = dict(rng.choice(ADAPTERS))
    for _ in range(rng.choice((1, 1, 2, 3))):
        # Half of the time a field that the method has: others are refused by their names.
        known = list(fields)
        name = rng.choice(known) if rng.random() < 0.3 else rng.choice(_FIELDS)
        fields[name] = rng.choice(_ANYTHING)
    return json.dumps(fields)


def bad_adapters(built: Sequence) -> None:
    """Adapter configurations that PEFT would choke on."""
    for _ in range(3):
        added = pb.AddAdapter(adapter=f"b{built.rng.randrange(4)}", seed=whole(built.rng))
        added.peft_config_json = hostile_json(built.rng)
        built.send(pb.SessionRequest(add_adapter=added))
        built.send(pb.SessionRequest(snapshot=pb.Snapshot(adapter=added.adapter, parts=[1, 2, 3])))


def bad_opens(built: Sequence) -> None:
    """Terms of a session that are none."""
    rng = built.rng
    built.frames.clear()
    for _ in range(2):
        built.open(
            peft_config_json=hostile_json(rng),
            seed=whole(rng),
            dropout=rng.choice((0.0, 0.0, real(rng))),
            wire_dtype=rng.choice((0, 1, 2, 3, 4, 5, 9, 10, -1)),
            start_layer=rng.choice((START, START, 0, 2**32 - 1)),
            end_layer=rng.choice((END, END, 0, 2**32 - 1)),
        )
    built.train_step()


def bad_optimizers(built: Sequence) -> None:
    """Steps whose optimizer is none, or has settings that no arithmetic survives."""
    rng = built.rng
    for number in range(1, 4):
        built.forward()
        built.backward()
        body = pb.Step(step=rng.choice((number, number, number, whole(rng))), gradient_scale=1.0)
        body.optimizer.CopyFrom(_optimizer(rng))
        if rng.random() < 0.3:
            body.gradient_scale = real(rng)
        built.send(pb.SessionRequest(step=body))
    built.send(pb.SessionRequest(snapshot=pb.Snapshot(parts=[1, 2, 3])))


def bad_states(built: Sequence) -> None:
    """Weights and optimizer states of the right names and shapes, with other values; or neither."""
    rng = built.rng
    weights = built.lora_weights()
    if not weights:
        return
    built.send(pb.SessionRequest(snapshot=pb.Snapshot(parts=[1, 3])))
    name = rng.choice(OPTIMIZERS)
    state: dict[str, torch.Tensor] = {}
    for weight, tensor in weights.items():
        state |= _state(name, weight.replace("adapter/", "optimizer/"), tensor, rng)
    sent = weights | state if rng.random() < 0.4 else state
    if rng.random() < 0.3:
        victim = rng.choice(list(sent))
        sent[victim] = rng.choice((
            torch.zeros(()), torch.zeros(0), torch.zeros(1, dtype=torch.bool), sent[victim][:1],
            _filled(sent[victim], real(rng)), sent[victim].to(torch.int64),
            sent[victim].to(torch.float64),
        )) if sent[victim].ndim else torch.zeros(2)  # fmt: skip
    if rng.random() < 0.2:
        sent[rng.choice(("optimizer/", "adapter/", "optimizer//", "x", ""))] = torch.zeros(1)
    body = pb.Restore(committed_step=rng.choice((0, 0, 1, 2**64 - 1)))
    body.optimizer.CopyFrom(pb.Optimizer(name=name, hyperparameters={"lr": 0.01}))
    built.send(pb.SessionRequest(restore=body), sent)
    built.forward()
    built.backward()
    step = pb.Step(step=body.committed_step + 1 if body.committed_step < 2 else 2**64 - 1)
    step.gradient_scale = 1.0
    step.optimizer.CopyFrom(body.optimizer)
    built.send(pb.SessionRequest(step=step))


def bad_allocations(built: Sequence) -> None:
    """AdaLoRA's messages where they do not fit."""
    rng = built.rng
    shape = rng.choice(((4,), (0,), (3,), (4, 1), ()))
    dtype = rng.choice((torch.bool, torch.float32, torch.int64, torch.uint8))
    fill = rng.choice((0, 1, 7))
    kept = {f"keep/base_model.model.transformer.h.{block}.attn.c_attn.lora_E":
            torch.full(shape, fill).to(dtype) for block in range(START, END)}  # fmt: skip
    for _ in range(3):
        built.send(pb.SessionRequest(allocate=pb.Allocate(last=rng.random() < 0.5)), kept)
        built.send(pb.SessionRequest(importance=pb.Importance(update=True, report=True)))
        built.send(pb.SessionRequest(snapshot=pb.Snapshot(parts=[1, 2, 3])))
        built.train_step()
    built.restore()


def _optimizer(rng: random.Random) -> pb.Optimizer:
    optimizer = pb.Optimizer(name=rng.choice((*OPTIMIZERS, "lbfgs", "")))
    for _ in range(rng.randrange(4)):
        optimizer.hyperparameters[rng.choice(_HYPERPARAMETERS)] = real(rng)
    for _ in range(rng.choice((0, 0, 1, 2))):
        optimizer.flags[rng.choice(_FLAGS)] = rng.random() < 0.7
    return optimizer


def _filled(like: torch.Tensor, value: float) -> torch.Tensor:
    # By way of float64, since torch refuses to fill float32 with what does not fit.
    return torch.full(like.shape, value, dtype=torch.float64).to(torch.float32)


def _state(
    optimizer: str, name: str, weight: torch.Tensor, rng: random.Random
) -> dict[str, torch.Tensor]:
    """What torch keeps of a parameter, with a step count that was never counted."""
    step = torch.tensor(rng.choice((0.0, 1.0, -1.0, -2.0, 1e30, real(rng))))
    like = {key: _filled(weight, rng.choice((0.0, -1.0, real(rng)))) for key in "ab"}
    match optimizer:
        case "adamw" | "adam" | "radam":
            found = {"step": step, "exp_avg": like["a"], "exp_avg_sq": like["b"]}
        case "nadam":
            found = {"step": step, "exp_avg": like["a"], "exp_avg_sq": like["b"],
                     "mu_product": torch.tensor(real(rng))}  # fmt: skip
        case "adamax":
            found = {"step": step, "exp_avg": like["a"], "exp_inf": like["b"]}
        case "adagrad":
            found = {"step": step, "sum": like["a"]}
        case "adadelta":
            found = {"step": step, "square_avg": like["a"], "acc_delta": like["b"]}
        case "rmsprop":
            found = {"step": step, "square_avg": like["a"]}
        case "rprop":
            found = {"step": step, "prev": like["a"], "step_size": like["b"]}
        case "asgd":
            found = {"step": step, "ax": like["a"], "eta": torch.tensor(real(rng)),
                     "mu": torch.tensor(real(rng))}  # fmt: skip
        case "adafactor":
            found = {"step": step, "row_var": like["a"][:, :1], "col_var": like["b"][:1]}
        case "transformers_adafactor":
            found = {"step:int": step.double(), "exp_avg_sq_row": like["a"][:, 0],
                     "exp_avg_sq_col": like["b"][0], "RMS": torch.tensor(real(rng))}  # fmt: skip
        case _:
            found = {"momentum_buffer": like["a"]}
    return {f"{name}/{key}": value.contiguous() for key, value in found.items()}


SETTINGS_CASES: tuple[Callable[[Sequence], None], ...] = (
    bad_adapters, bad_adapters, bad_opens, bad_opens, bad_optimizers, bad_optimizers, bad_states,
    bad_states, bad_allocations,
)  # fmt: skip
