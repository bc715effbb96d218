"""Every public call of PEFT's models, tuners and helpers, on the split and on the whole model."""

# ruff: noqa: E501

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft.helpers
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn
from transformers import Trainer, TrainingArguments

from client_service import SplitModelForCausalLM
from client_service.whole import load_whole
from shared.errors import TrunklineError
from shared.models import SplitRange
from shared.models.split_layout import write_split_layout
from shared.skeleton import RemoteTensor
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model
from tests.peft_calls import REFUSED, is_refused, public_calls
from tests.peft_rows import ROWS, Row

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)

ROOT = Path(__file__).parents[2]
IDS = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
TASKS = torch.tensor([0, 1, 0])

Act = Callable[[Any, Path], Any]


@dataclass(frozen=True)
class Case:
    """What is done to a model."""

    act: Act
    row: str = "LoRA"
    """How it is adapted."""
    looks: bool = True
    """Whether what the model computes afterwards is looked at."""


def other(model: Any, **fields: Any) -> Any:
    torch.manual_seed(5)
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", **settings | fields))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.*"))}


def shown(act: Callable[[], Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        act()
    return out.getvalue()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def then(*acts: Callable[[], Any]) -> Any:
    """The last one's result."""
    return [act() for act in acts][-1]


def stepped(model: Any) -> list[torch.Tensor]:
    model.train()(**BATCH).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def allocated(model: Any) -> None:
    stepped(model)
    for step in range(1, 5):
        model.base_model.update_and_allocate(step)


def with_rank_pattern(model: Any) -> Any:
    """As PEFT loads an adapter whose ranks were allocated."""
    allocated(model)
    pattern = {f"{n}": kept for n, kept in model.peft_config["default"].rank_pattern.items()}
    model.base_model.resize_modules_by_rank_pattern(pattern, "default")
    return pattern


def mixin_loss(model: Any, folder: Path) -> torch.Tensor:
    class Mixed(peft.helpers.MontecloraTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    return Mixed(model, arguments).compute_loss(model, dict(BATCH))  # type: ignore[no-any-return]


def signature(update: Any, name: str) -> Act:
    return lambda m, _: (update(m), str(inspect.signature(getattr(m, name))))[1]


def encoder(model: Any) -> Any:
    return model.prompt_encoder["default"]


def weighted(model: Any, **how: Any) -> None:
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "both", **how)
    model.set_adapter("both")


def ia3_weighted(model: Any) -> None:
    model.add_adapter("other", row("IA3").config("llama"))
    weighted(model)


def selected(model: Any) -> list[str]:
    found = peft.helpers.KappaTuneSelector(model.get_base_model(), show_progress=False)
    return found.get_best_targets(num_modules=6)  # type: ignore[no-any-return]


def here(state: Mapping[str, Any]) -> dict[str, Any]:
    """Without the matrices of the trunk's blocks, which are not the client's to save."""
    inside = ("layers.1.", "layers.2.")
    return {
        n: t
        for n, t in state.items()
        if t.ndim < 2 or "lora" in n or not any(part in n for part in inside)
    }


def loaded_elsewhere(model: Any, folder: Path) -> Any:
    saved(model, folder)
    return PeftModel.from_pretrained(model.unload(), folder, is_trainable=True)


def injected(model: Any) -> None:
    torch.manual_seed(5)
    tuner = model.base_model
    tuner.peft_config["other"] = LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    tuner.inject_adapter(tuner.model, "other")
    tuner.set_adapter("other")


def doubled(model: Any, given: Any, output: Any) -> Any:
    output.logits = output.logits * 2
    return output


def head() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(64, VOCAB).requires_grad_(False)


def second_of(name: str, model: Any) -> Any:
    torch.manual_seed(5)
    model.add_adapter("other", row(name).config("llama"))
    return model


# One a line: they are a table.
# fmt: off
CALLS: dict[str, Case] = {
    "AdaLoraModel.resize_modules_by_rank_pattern": Case(lambda m, _: with_rank_pattern(m), "AdaLoRA"),
    "PeftModel.active_adapters": Case(lambda m, _: m.active_adapters),
    "PeftModel.active_peft_config": Case(lambda m, _: m.active_peft_config.to_dict()),
    "PeftModel.add_adapter": Case(lambda m, _: other(m).set_adapter("other")),
    "PeftModel.base_model_torch_dtype": Case(lambda m, _: m.base_model_torch_dtype),
    "PeftModel.create_or_update_model_card": Case(lambda m, d: (m.create_or_update_model_card(str(d)), files(d))),
    "PeftModel.delete_adapter": Case(lambda m, _: then(lambda: other(m).set_adapter("other"), lambda: m.delete_adapter("other"))),
    "PeftModel.disable_adapter": Case(lambda m, _: contextlib.ExitStack().enter_context(m.disable_adapter()) or logits(m)),
    "PeftModel.forward": Case(lambda m, _: PeftModel.forward(m, **BATCH).loss),
    "PeftModel.from_pretrained": Case(loaded_elsewhere),
    "PeftModel.generate": Case(lambda m, _: PeftModel.generate(m.eval(), input_ids=IDS, max_new_tokens=4)),
    "PeftModel.get_base_model": Case(lambda m, _: m.get_base_model()),
    "PeftModel.get_layer_status": Case(lambda m, _: m.get_layer_status()),
    "PeftModel.get_model_status": Case(lambda m, _: m.get_model_status()),
    "PeftModel.get_nb_trainable_parameters": Case(lambda m, _: m.get_nb_trainable_parameters()),
    "PeftModel.get_prompt": Case(lambda m, _: m.get_prompt(2), "prompt tuning"),
    "PeftModel.get_prompt_embedding_to_save": Case(lambda m, _: m.get_prompt_embedding_to_save("default"), "P-tuning"),
    "PeftModel.has_active_enabled_adapter": Case(lambda m, _: m.has_active_enabled_adapter),
    "PeftModel.load_adapter": Case(lambda m, d: (m.load_adapter(saved(m, d), "again", is_trainable=True), m.set_adapter("again"))),
    "PeftModel.modules_to_save": Case(lambda m, _: m.modules_to_save, "LoRA, modules_to_save of norms"),
    "PeftModel.peft_config": Case(lambda m, _: {n: c.to_dict() for n, c in m.peft_config.items()}),
    "PeftModel.prepare_model_for_gradient_checkpointing": Case(lambda m, _: stepped(m.prepare_model_for_gradient_checkpointing(m.get_base_model()) or m)),
    "PeftModel.print_trainable_parameters": Case(lambda m, _: shown(m.print_trainable_parameters)),
    "PeftModel.save_pretrained": Case(lambda m, d: files(saved(other(m), d))),
    "PeftModel.set_adapter": Case(lambda m, _: other(m).set_adapter("other", inference_mode=True)),
    "PeftModel.set_requires_grad": Case(lambda m, _: m.set_requires_grad("default", False)),
    "PeftModel.supports_lora_conversion": Case(lambda m, _: m.supports_lora_conversion()),
    "PeftModelForCausalLM.forward": Case(lambda m, _: m(**BATCH).loss, "prefix tuning"),
    "PeftModelForCausalLM.generate": Case(lambda m, _: m.eval().generate(input_ids=IDS, max_new_tokens=4, use_cache=True), "prefix tuning"),
    "PeftModelForCausalLM.prepare_inputs_for_generation": Case(lambda m, _: m.prepare_inputs_for_generation(IDS, attention_mask=torch.ones_like(IDS))),
    "PushToHubMixin.push_to_hub": Case(lambda m, _: m.push_to_hub("nobody/nothing")),
    "BaseTuner.active_adapters": Case(lambda m, _: m.base_model.active_adapters),
    "BaseTuner.delete_adapter": Case(lambda m, _: then(lambda: other(m).base_model.delete_adapter("default"), lambda: m.set_adapter("other"))),
    "BaseTuner.disable_adapter_layers": Case(lambda m, _: m.base_model.disable_adapter_layers()),
    "BaseTuner.enable_adapter_layers": Case(lambda m, _: then(m.base_model.disable_adapter_layers, m.base_model.enable_adapter_layers)),
    "BaseTuner.forward": Case(lambda m, _: m.base_model(**BATCH).logits),
    "BaseTuner.get_model_config": Case(lambda m, _: m.base_model.get_model_config(m.base_model.model)),
    "BaseTuner.inject_adapter": Case(lambda m, _: injected(m)),
    "BaseTuner.set_adapter": Case(lambda m, _: other(m).base_model.set_adapter(["default", "other"])),
    "BaseTuner.set_requires_grad": Case(lambda m, _: m.base_model.set_requires_grad("default", False)),
    "BaseTuner.supports_lora_conversion": Case(lambda m, _: m.base_model.supports_lora_conversion(), "LoHa"),
    "BaseTuner.unload": Case(lambda m, _: m.base_model.unload()),
    "BaseTuner.unmerge_adapter": Case(lambda m, _: m.base_model.unmerge_adapter()),
    "LoraModel.add_weighted_adapter": Case(lambda m, _: weighted(other(m), combination_type="cat")),
    "LoraModel.subtract_mutated_init": Case(lambda m, _: m.base_model.subtract_mutated_init(get_peft_model_state_dict(other(m, r=4, target_modules=["q_proj"]), adapter_name="other"), "default", {})),
    "IA3Model.add_weighted_adapter": Case(lambda m, _: ia3_weighted(m), "IA3"),
    "AdaLoraModel.add_weighted_adapter": Case(lambda m, _: m.base_model.add_weighted_adapter(), "AdaLoRA"),
    "AdaLoraModel.forward": Case(lambda m, _: m.base_model(**BATCH).loss, "AdaLoRA"),
    "AdaLoraModel.resize_state_dict_by_rank_pattern": Case(lambda m, d: then(lambda: allocated(m), lambda: files(saved(m, d))), "AdaLoRA"),
    "AdaLoraModel.update_and_allocate": Case(lambda m, _: allocated(m), "AdaLoRA"),
    "AdamssModel.update_and_allocate": Case(lambda m, _: allocated(m), "AdaMSS"),
    "CPTEmbedding.calculate_loss": Case(lambda m, _: stepped(m), "CPT"),
    "CPTEmbedding.forward": Case(lambda m, _: encoder(m)(torch.arange(4)), "CPT"),
    "CPTEmbedding.get_epsilon": Case(lambda m, _: encoder(m).get_epsilon(), "CPT"),
    "CPTEmbedding.get_projection": Case(lambda m, _: encoder(m).get_projection(), "CPT"),
    "CPTEmbedding.set_updated_tokens": Case(lambda m, _: (encoder(m).set_updated_tokens(), stepped(m)), "CPT"),
    "CartridgeEncoder.embedding": Case(lambda m, _: encoder(m).embedding.weight, "Cartridge"),
    "CartridgeEncoder.forward": Case(lambda m, _: encoder(m)(torch.zeros(2, 4)), "Cartridge"),
    "CartridgeEncoder.load_prompt_embeddings": Case(lambda m, _: encoder(m).load_prompt_embeddings(torch.ones_like(encoder(m).weight)), "Cartridge"),
    "CartridgeEncoder.reset_parameters": Case(lambda m, _: (torch.manual_seed(2), encoder(m).reset_parameters())[1], "Cartridge"),
    "CartridgeEncoder.weight": Case(lambda m, _: encoder(m).weight, "Cartridge"),
    "MultitaskPromptEmbedding.forward": Case(lambda m, _: encoder(m)(torch.zeros(3, 4).long(), TASKS), "multitask prompt tuning"),
    "OSFModel.unmerge_adapter": Case(lambda m, _: m.base_model.unmerge_adapter(), "OSF"),
    "PrefixEncoder.forward": Case(lambda m, _: encoder(m)(torch.arange(4)[None]), "prefix tuning"),
    "PrefixEncoder.load_prompt_embeddings": Case(lambda m, _: encoder(m).load_prompt_embeddings(torch.ones_like(encoder(m).embedding.weight)), "prefix tuning"),
    "PromptEmbedding.forward": Case(lambda m, _: encoder(m)(torch.arange(4)[None]), "prompt tuning"),
    "PromptEncoder.forward": Case(lambda m, _: encoder(m)(torch.arange(4)[None]), "P-tuning"),
    "TrainableTokensModel.inject_adapter": Case(lambda m, _: stepped(m), "trainable tokens"),
    "UniLoraModel.generate_index": Case(lambda m, _: m.base_model.generate_index(100, 10, 3), "UniLoRA"),
    "UniLoraModel.inject_adapter": Case(lambda m, _: m(**BATCH).loss, "UniLoRA"),
    "VBLoRAModel.get_nb_savable_parameters": Case(lambda m, _: m.base_model.get_nb_savable_parameters(), "VB-LoRA"),
    "VBLoRAModel.print_savable_parameters": Case(lambda m, _: shown(m.base_model.print_savable_parameters), "VB-LoRA"),
    "WaveFTModel.delete_adapter": Case(lambda m, _: second_of("WaveFT", m).delete_adapter("default"), "WaveFT"),
    "helpers.DoraCaching": Case(lambda m, _: contextlib.ExitStack().enter_context(peft.helpers.DoraCaching()) or (logits(m), logits(m)), "LoRA, DoRA"),
    "helpers.MontecloraTrainerMixin": Case(mixin_loss),
    "helpers.check_if_peft_model": Case(lambda m, d: (peft.helpers.check_if_peft_model(str(d)), peft.helpers.check_if_peft_model(str(saved(m, d))))),
    "helpers.disable_input_dtype_casting": Case(lambda m, _: contextlib.ExitStack().enter_context(peft.helpers.disable_input_dtype_casting(m)) or logits(m)),
    "helpers.rescale_adapter_scale": Case(lambda m, _: contextlib.ExitStack().enter_context(peft.helpers.rescale_adapter_scale(m, 0.5)) or logits(m)),
    "helpers.update_forward_signature": Case(signature(peft.helpers.update_forward_signature, "forward")),
    "helpers.update_generate_signature": Case(signature(peft.helpers.update_generate_signature, "generate")),
    "helpers.update_signature": Case(signature(peft.helpers.update_signature, "forward")),
    "Module.add_module": Case(lambda m, _: m.add_module("more", nn.Linear(2, 2, bias=False).requires_grad_(False)), looks=False),
    "Module.apply": Case(lambda m, _: m.apply(lambda one: one.train(False))),
    "Module.buffers": Case(lambda m, _: list(m.buffers())),
    "Module.children": Case(lambda m, _: list(m.children())),
    "Module.compile": Case(lambda m, _: m.compile(backend="eager")),
    "Module.cpu": Case(lambda m, _: m.cpu()),
    "Module.cuda": Case(lambda m, _: m.cuda() if not torch.cuda.is_available() else None),
    "Module.eval": Case(lambda m, _: m.eval().training),
    "Module.extra_repr": Case(lambda m, _: (m.extra_repr(), str(m))),
    "Module.float": Case(lambda m, _: m.float()),
    "Module.get_buffer": Case(lambda m, _: m.get_buffer("base_model.model.model.rotary_emb.inv_freq")),
    "Module.get_extra_state": Case(lambda m, _: m.get_extra_state()),
    "Module.get_parameter": Case(lambda m, _: m.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight")),
    "Module.get_submodule": Case(lambda m, _: m.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")),
    "Module.ipu": Case(lambda m, _: m.ipu()),
    "Module.load_state_dict": Case(lambda m, _: str(m.load_state_dict({n: t + 1 for n, t in m.state_dict().items() if "lora" in n}, strict=False).unexpected_keys)),
    "Module.modules": Case(lambda m, _: list(m.modules())),
    "Module.mtia": Case(lambda m, _: m.mtia()),
    "Module.named_buffers": Case(lambda m, _: dict(m.named_buffers())),
    "Module.named_children": Case(lambda m, _: dict(m.named_children())),
    "Module.named_modules": Case(lambda m, _: dict(m.named_modules())),
    "Module.named_parameters": Case(lambda m, _: dict(m.named_parameters())),
    "Module.parameters": Case(lambda m, _: list(m.parameters())),
    "Module.register_backward_hook": Case(lambda m, _: m.register_backward_hook(lambda *_: None) and stepped(m)),
    "Module.register_buffer": Case(lambda m, _: m.register_buffer("more", torch.ones(2))),
    "Module.register_forward_hook": Case(lambda m, _: m.register_forward_hook(doubled) and None),
    "Module.register_forward_pre_hook": Case(lambda m, _: m.register_forward_pre_hook(lambda one, given: None) and None),
    "Module.register_full_backward_hook": Case(lambda m, _: m.register_full_backward_hook(lambda *_: None) and stepped(m)),
    "Module.register_full_backward_pre_hook": Case(lambda m, _: m.register_full_backward_pre_hook(lambda *_: None) and stepped(m)),
    "Module.register_load_state_dict_post_hook": Case(lambda m, _: m.register_load_state_dict_post_hook(lambda *_: None) and None),
    "Module.register_load_state_dict_pre_hook": Case(lambda m, _: m.register_load_state_dict_pre_hook(lambda *_: None) and None),
    "Module.register_module": Case(lambda m, _: m.register_module("more", nn.Linear(2, 2, bias=False).requires_grad_(False)), looks=False),
    "Module.register_parameter": Case(lambda m, _: m.register_parameter("more", nn.Parameter(torch.ones(2)))),
    "Module.register_state_dict_post_hook": Case(lambda m, _: m.register_state_dict_post_hook(lambda *_: None) and here(m.state_dict())),
    "Module.register_state_dict_pre_hook": Case(lambda m, _: m.register_state_dict_pre_hook(lambda *_: None) and here(m.state_dict())),
    "Module.requires_grad_": Case(lambda m, _: m.requires_grad_(False)),
    "Module.set_extra_state": Case(lambda m, _: m.set_extra_state(None)),
    "Module.set_submodule": Case(lambda m, _: m.set_submodule("base_model.model.lm_head", head())),
    "Module.share_memory": Case(lambda m, _: m.share_memory()),
    "Module.state_dict": Case(lambda m, _: here(m.state_dict())),
    "Module.to": Case(lambda m, _: m.to("cpu", torch.float32)),
    "Module.to_empty": Case(lambda m, _: {n: p.shape for n, p in m.to_empty(device="cpu").named_parameters()}, looks=False),
    "Module.train": Case(lambda m, _: m.train(False).training),
    "Module.xpu": Case(lambda m, _: m.xpu() if not torch.xpu.is_available() else None),
    "Module.zero_grad": Case(lambda m, _: then(lambda: stepped(m), lambda: m.zero_grad(set_to_none=False), lambda: [p.grad for p in m.parameters()])),
}
"""What is equal."""

DONE: dict[str, Case] = {
    "BaseTuner.merge_adapter": Case(lambda m, _: m.base_model.merge_adapter()),
    "BaseTuner.merge_and_unload": Case(lambda m, _: m.base_model.merge_and_unload()),
    "helpers.KappaTuneSelector": Case(lambda m, _: selected(m)),
    "helpers.find_kappa_target_modules": Case(lambda m, _: peft.helpers.find_kappa_target_modules(m.get_base_model(), show_progress=False)),
    "AdaptionPromptModel.*": Case(lambda m, _: logits(m), "adaption prompt"),
    "PolyModel.*": Case(lambda m, _: m(**BATCH, task_ids=TASKS), "Poly"),
    "ShadowModel.*": Case(lambda m, _: logits(m), "Shadow"),
    "TinyLoraModel.*": Case(lambda m, _: logits(m), "TinyLoRA"),
    "XLoraModel.*": Case(lambda m, _: logits(m), "X-LoRA"),
    "Module.bfloat16": Case(lambda m, _: logits(m.bfloat16())),
    "Module.double": Case(lambda m, _: logits(m.double())),
    "Module.half": Case(lambda m, _: logits(m.half())),
    "Module.type": Case(lambda m, _: logits(m.type(torch.float64))),
    "Module.requires_grad_(True)": Case(lambda m, _: logits(m.requires_grad_(True))),
}
"""What is refused."""
# fmt: on

RAISE = frozenset(
    {
        "AdaLoraModel.add_weighted_adapter",
        "Module.get_extra_state",
        "Module.set_extra_state",
        "OSFModel.unmerge_adapter",
        "PushToHubMixin.push_to_hub",
    }
)
"""What raises on the whole model: the split one says the same."""

LACKING = frozenset(
    {"AdamssModel.update_and_allocate", *(f"Module.{n}" for n in ("cuda", "ipu", "mtia", "xpu"))}
)
"""What raises where a package or a device is missing."""


REASONS = r"accepted|--serve-weights|trees differ|not sent"


def row(name: str) -> Row:
    return next(one for one in ROWS if one.name == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("tiny")
    saved = save_tiny_model("llama", scratch / "model", num_hidden_layers=4, use_cache=False)
    # Whose client has no copy of the trunk's matrices.
    write_split_layout(saved, SplitRange(1, 3), scratch / "parts")
    shutil.rmtree(scratch / "parts" / "trunk")
    return saved


@dataclass(frozen=True)
class Places:
    """Where models are, and what serves their middle blocks."""

    folder: Path
    ends: Path
    trunkd: Callable[..., Daemon]
    sessions: contextlib.ExitStack

    def whole(self) -> Any:
        return load_whole(self.folder)

    def split(self, of: Path, *flags: str) -> Any:
        daemon = self.trunkd("--model", str(self.folder), "--split", "1:3", *flags)
        model = SplitModelForCausalLM.from_pretrained(of, daemon.address)
        self.sessions.callback(model.remote_trunk.close)
        return model


@pytest.fixture
def places(folder: Path, trunkd: Callable[..., Daemon]) -> Iterator[Places]:
    with contextlib.ExitStack() as sessions:
        yield Places(folder, folder.with_name("parts"), trunkd, sessions)


def adapted(base: Any, name: str) -> Any:
    """With values that matter, the same for whoever has the same names."""
    config = row(name).config("llama")
    torch.manual_seed(3)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@dataclass(frozen=True)
class Raised:
    """An error, which both are to have."""

    kind: str
    words: str


@dataclass(frozen=True)
class Seen:
    """What came of a call."""

    result: Any
    parameters: dict[str, Any]
    computed: Any


def done(case: Case, base: Any, scratch: Path) -> Seen:
    scratch.mkdir()
    model = None
    try:
        model = adapted(base, case.row)
        result = case.act(model, scratch)
    except TrunklineError:
        raise
    except Exception as error:
        result = Raised(type(error).__name__, str(error).split("\n")[0])
    if not (case.looks and model is not None):
        return Seen(result, {}, None)
    parameters = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    of = result if isinstance(result, nn.Module) and hasattr(result, "generate") else model
    try:
        tasks = {"task_ids": TASKS} if "multitask" in case.row else {}
        with torch.no_grad():
            computed: Any = of.eval()(**BATCH, **tasks)
        computed = getattr(computed, "logits", computed)
    except TrunklineError:
        raise
    except Exception as error:
        computed = Raised(type(error).__name__, str(error).split("\n")[0])
    return Seen(result, parameters, computed)


def raised(result: Any) -> bool:
    return isinstance(result, Raised)


def differing(ours: Any, theirs: Any, at: str = "it") -> list[str]:
    """Where two results are not the same."""
    if isinstance(ours, RemoteTensor) and isinstance(theirs, torch.Tensor):
        return [] if (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) else [at]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [at]
    if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module):
        return [] if type(ours).__name__ == type(theirs).__name__ else [at]
    if dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(theirs):
        return differing(vars(ours), vars(theirs), at)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if list(ours) != list(theirs):
            return [f"{at}: {sorted(set(ours) ^ set(theirs))[:3]}"]
        return [one for k in ours for one in differing(ours[k], theirs[k], f"{at}[{k!r}]")]
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return [f"{at}: {len(ours)} and {len(theirs)}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [one for i, (a, b) in pairs for one in differing(a, b, f"{at}[{i}]")]
    return [] if ours == theirs else [f"{at}: {ours!r:.200} and {theirs!r:.200}"]


def test_every_public_call_is_on_one_list() -> None:
    calls = public_calls()
    assert CALLS.keys() >= RAISE | LACKING
    assert sorted(c for c in calls if c not in CALLS and not is_refused(c)) == []
    assert sorted(c for c in CALLS if c not in calls) == []
    assert DONE.keys() == REFUSED.keys()
    assert len(REFUSED) <= 25
    owners = {call.split(".")[0] for call in calls}
    for name in REFUSED:
        owner, _, call = name.partition("(")[0].partition(".")
        assert owner in owners if call == "*" else f"{owner}.{call}" in calls, name
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    assert [name for name, why in REFUSED.items() if f"* `{name}`: {why}\n" not in page] == []


@pytest.mark.parametrize("name", CALLS)
def test_it_does_to_the_split_what_it_does_to_the_whole(
    name: str, places: Places, tmp_path: Path
) -> None:
    case = CALLS[name]
    found = done(case, places.split(places.folder), tmp_path / "ours")
    expected = done(case, places.whole(), tmp_path / "theirs")
    assert differing(vars(found), vars(expected), "") == []
    if name not in LACKING:
        assert raised(expected.result) == (name in RAISE), expected.result
        assert not raised(expected.computed), expected.computed


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name: str, places: Places, tmp_path: Path) -> None:
    case = DONE[name]
    expected = done(case, places.whole(), tmp_path / "theirs")
    assert not raised(expected.result)
    with pytest.raises(TrunklineError, match=REASONS):
        done(case, places.split(places.ends), tmp_path / "ours")
    if "--serve-weights" in REFUSED[name]:
        split = places.split(places.ends, "--serve-weights")
        found = done(case, split, tmp_path / "served")
        assert differing(vars(found), vars(expected), "") == []
