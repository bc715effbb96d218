"""The trunk as a function: stock PEFT on the split model beside stock PEFT on the whole one."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from client_service import SplitModelForCausalLM
from client_service.calls import SessionTerms
from client_service.dropout_key import SECRET_VARIABLE
from client_service.session import TrunkSession
from client_service.skeleton_model import with_skeleton
from shared.errors import AdapterError, InvalidInputError, ProtocolError, SharedWeightsError
from shared.models import SplitRange, open_checkpoint
from shared.models.families import FAMILIES, family_of
from shared.models.split_layout import write_split_layout
from tests.conftest import Daemon, start_daemon
from tests.models import VOCAB, save_tiny_model
from tests.patience import PATIENCE_S

pytestmark = [
    # The whole model has no loss type either, and says so.
    pytest.mark.filterwarnings("ignore:`loss_type=None`"),
    # PEFT says so of every position that generate() itself made.
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

FAST = ("gpt2", "llama", "gemma2")  # the latter has blocks with and without a window

Start = Callable[..., Daemon]
Open = Callable[..., Any]


@pytest.fixture
def split_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens split models; ends their sessions."""
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "dropout_secret"))
    with ExitStack() as sessions:

        def opened(folder: Path, address: str) -> Any:
            checkpoint = open_checkpoint(folder)
            session = sessions.enter_context(closing(TrunkSession(address, SessionTerms())))
            served = SplitRange(session.info.start_layer, session.info.end_layer)
            return with_skeleton(checkpoint, served, session, torch.float32)

        yield opened


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def lora(folder: Path, **changes: Any) -> LoraConfig:
    family = open_checkpoint(folder).family
    settings = {
        "r": 4,
        "target_modules": list(family.linear_layers),
        "fan_in_fan_out": family.model_type == "gpt2",
    }
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def adapted(model: Any, config: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, copy.deepcopy(config)).train()


def batches(count: int, seed: int = 3) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        ids = torch.randint(3, VOCAB, (3, 16), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, slice(0, 5) if number % 2 else slice(-5, None)] = 0
        labels = ids.masked_fill(mask == 0, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def trained(model: Any, steps: int = 3, **settings: Any) -> list[float]:
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, **settings)
    losses = []
    for batch in batches(steps):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same(split: Any, whole: Any) -> None:
    """The same trainable parameters, under the same names, in the same order, to the bit."""
    ours = {n: p for n, p in split.named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in whole.named_parameters() if p.requires_grad}
    assert list(ours) == list(theirs) and ours
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name


@pytest.mark.numeric
@pytest.mark.parametrize(
    "family",
    [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_stock_peft_trains_as_on_the_whole_model(
    family: str, trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", num_hidden_layers=4)
    daemon = trunkd("--model", str(folder), "--split", "1:3")
    split, whole = split_of(folder, daemon.address), load(folder)
    assert type(split).__name__ == type(whole).__name__
    assert [n for n, _ in split.named_parameters()] == [n for n, _ in whole.named_parameters()]
    ours, theirs = adapted(split, lora(folder)), adapted(whole, lora(folder))
    assert_same(ours, theirs)
    assert trained(ours) == trained(theirs)
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    plain = split_of(folder, daemon.address)
    again = PeftModel.from_pretrained(plain, tmp_path / "ours", is_trainable=True).train()
    assert trained(again) == trained(theirs)
    ids, mask = torch.tensor([[5, 9, 30, 7], [0, 0, 11, 12]]), torch.ones(2, 4, dtype=torch.long)
    mask[1, :2] = 0
    for settings in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        texts = []
        for model in (again.eval(), theirs.eval()):
            torch.manual_seed(5)
            given = {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}
            texts.append(model.generate(**given, **settings, max_new_tokens=12))
        assert torch.equal(*texts)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("gpt2") / "model", n_layer=4)


@pytest.fixture
def pair(gpt2: Path, trunkd: Start, split_of: Open) -> tuple[Any, Any]:
    """The split and the whole model with the same fresh adapter."""
    daemon = trunkd("--model", str(gpt2), "--split", "1:3")
    split, whole = split_of(gpt2, daemon.address), load(gpt2)
    return adapted(split, lora(gpt2)), adapted(whole, lora(gpt2))


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, trainable(model), retain_graph=True))


def averaged(model: Any) -> None:
    """Weights that are put aside and back as averaging and "load the best" do, by ``.data``."""
    kept = [p.detach().clone() for p in trainable(model)]
    trained(model, 2)
    for parameter, before in zip(trainable(model), kept, strict=True):
        parameter.data.copy_((parameter.data + before) / 2)


def by_groups(model: Any) -> None:
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and "lora_A" in n]
    others = [p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "lr": 0.1, "weight_decay": 0.1}, {"params": others, "lr": 1.0}]
    )
    for batch in batches(3):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()


def some_frozen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".1.attn" in name and "lora" in name:
            parameter.requires_grad_(False)
    trained(model)


def norms_too(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "ln_1" in name or "bias" in name:
            parameter.requires_grad_(True)
    trained(model, weight_decay=0.1)


def scaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    trained(model)


def two_adapters(model: Any) -> None:
    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model.add_adapter("second", config)
    model.set_adapter("second")
    trained(model)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    model.delete_adapter("second")


def deleted_and_made_again(model: Any) -> None:
    """The same values under the same names, after the trunk has dropped them."""
    for _ in range(2):
        torch.manual_seed(4)
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model.add_adapter("second", config)
        model.set_adapter("second")
        model(**next(batches(1)))
        model.set_adapter("default")
        model.delete_adapter("second")
        model(**next(batches(1)))
    trained(model, 1)


def another_class(model: Any) -> None:
    trained(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    for batch in batches(2, seed=9):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loaded_best(model: Any) -> None:
    best = copy.deepcopy({n: p for n, p in model.state_dict().items() if "lora" in n})
    trained(model)
    model.load_state_dict(best, strict=False)
    trained(model, 1)


def probed(model: Any) -> None:
    loss = model(**next(batches(1))).loss
    for parameter, gradient in zip(trainable(model), gradients(model, loss), strict=True):
        parameter.grad = gradient * 2
    loss.backward()
    torch.optim.SGD(trainable(model), lr=0.1).step()


def two_forwards_before_one_backward(model: Any) -> None:
    first, second = batches(2)
    (model(**first).loss + 2 * model(**second).loss).backward()
    torch.optim.SGD(trainable(model), lr=0.1).step()


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")
    trained(model)


def under_autocast(model: Any) -> None:
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for batch in batches(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


WAYS = [
    eager,
    under_autocast,
    averaged,
    by_groups,
    some_frozen,
    norms_too,
    scaled,
    two_adapters,
    deleted_and_made_again,
    another_class,
    loaded_best,
    probed,
    two_forwards_before_one_backward,
]


@pytest.mark.parametrize("way", WAYS)
def test_ordinary_code_does_to_the_split_what_it_does_to_the_whole(
    way: Callable[[Any], None], pair: tuple[Any, Any]
) -> None:
    for model in pair:
        way(model)
    ours, theirs = pair
    assert_same(ours, theirs)
    batch = next(batches(1, seed=8))
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)
        with ours.disable_adapter(), theirs.disable_adapter():
            assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prefix", "projected prefix", "prompt", "p-tuning"])
def test_virtual_tokens_are_the_whole_model_s(
    method: str, family: str, trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", num_hidden_layers=4)
    daemon = trunkd("--model", str(folder), "--split", "1:3")
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    config: Any = {
        "prefix": PrefixTuningConfig(**common),
        "projected prefix": PrefixTuningConfig(
            **common, prefix_projection=True, encoder_hidden_size=32
        ),
        "prompt": PromptTuningConfig(**common),
        "p-tuning": PromptEncoderConfig(**common, encoder_hidden_size=32),
    }[method]
    split, whole = split_of(folder, daemon.address), load(folder)
    ours, theirs = adapted(split, config), adapted(whole, config)
    assert_same(ours, theirs)
    assert trained(ours) == trained(theirs)
    assert_same(ours, theirs)
    prompt = {"input_ids": torch.tensor([[5, 9, 30, 7]]), "pad_token_id": 0, "max_new_tokens": 8}
    texts = [m.eval().generate(**prompt, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*texts)


def test_each_row_may_have_its_own_adapter(pair: tuple[Any, Any]) -> None:
    answers = []
    for model in pair:
        torch.manual_seed(4)
        model.add_adapter("other", lora_of("gpt2", init_lora_weights=False))
        batch = {"input_ids": torch.arange(3, 27).view(3, 8)}
        names = ["default", "other", "__base__"]
        with torch.no_grad():
            answers.append(model.eval()(**batch, adapter_names=names).logits)
    assert torch.equal(*answers)


def lora_of(family: str, **changes: Any) -> LoraConfig:
    targets = list(family_of(family).linear_layers)
    return LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, **changes)


def test_a_lost_trunk_is_replaced_by_another(
    gpt2: Path, split_of: Open, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed between forward and backward, with two forwards open, and amid generating."""
    flags = ("--model", str(gpt2), "--split", "1:3")
    daemons = [start_daemon(tmp_path_factory.mktemp("trunk"), *flags) for _ in range(4)]
    addresses = ",".join(daemon.address for daemon in daemons)
    split, whole = split_of(gpt2, addresses), load(gpt2)
    ours, theirs = adapted(split, lora(gpt2)), adapted(whole, lora(gpt2))

    def lose() -> None:
        serving = split.passage.function.session.address
        next(d for d in daemons if d.address == serving).process.kill()

    def steps(model: Any, between: Callable[[], None]) -> None:
        optimizer = torch.optim.SGD(trainable(model), lr=0.5)
        for number, batch in enumerate(batches(3)):
            first, second = model(**batch).loss, model(**next(batches(1, seed=11))).loss
            if number == 1:
                between()
            first.backward()
            second.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == 2:
                between()

    steps(ours, lose)
    steps(theirs, lambda: None)
    assert_same(ours, theirs)

    class Losing(torch.nn.Module):
        """A logits processor that loses the trunk after five tokens."""

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] == 9:
                lose()
            return scores

    prompt = {"input_ids": torch.tensor([[5, 9, 30, 7]]), "pad_token_id": 0, "max_new_tokens": 12}
    expected = theirs.eval().generate(**prompt, num_beams=4)
    found = ours.eval().generate(**prompt, num_beams=4, logits_processor=[Losing()])
    assert torch.equal(found, expected)
    assert split.passage.function.session.recoveries == 3
    assert [d.process.poll() for d in daemons] == [-signal.SIGKILL] * 3 + [None]
    daemons[3].process.terminate()


def with_dropout(split_of: Open, folder: Path, address: str) -> tuple[list[float], Any]:
    split = split_of(folder, address)
    model = adapted(split, lora(folder, lora_dropout=0.3))
    assert not split.passage.function.session.recoveries
    torch.manual_seed(8)
    return trained(model), model


def test_dropout_repeats_however_the_trunk_holds_a_forward(
    trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    """Retained, recomputed, and again after a loss; other seeds give other masks."""
    dropout = {"resid_pdrop": 0.2, "attn_pdrop": 0.2, "n_layer": 4}
    folder = save_tiny_model("gpt2", tmp_path / "model", **dropout)
    flags = ("--model", str(folder), "--split", "1:3")
    daemon = trunkd(*flags)
    losses, model = with_dropout(split_of, folder, daemon.address)
    tight = trunkd(*flags, "--session-held-bytes", str(200_000))
    recomputed, other = with_dropout(split_of, folder, tight.address)
    assert recomputed == losses
    assert_same(other, model)
    again, _ = with_dropout(split_of, folder, daemon.address)
    assert again == losses
    torch.manual_seed(9)
    assert trained(model) != losses


def test_what_a_method_drops_by_itself_is_keyed_too(
    trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    """LoHa's layers draw in their forward, and have no dropout layer."""
    folder = save_tiny_model("llama", tmp_path / "model", num_hidden_layers=4)
    daemon = trunkd("--model", str(folder), "--split", "1:3")
    config = LoHaConfig(r=4, rank_dropout=0.5, target_modules=["q_proj"], init_weights=False)
    models = [adapted(split_of(folder, daemon.address), config) for _ in range(2)]
    losses = []
    for model in models:
        torch.manual_seed(8)
        losses.append(trained(model))
    assert losses[0] == losses[1]
    assert_same(*models)


def test_dropout_layers_in_other_modes_are_refused(
    gpt2: Path, trunkd: Start, split_of: Open
) -> None:
    daemon = trunkd("--model", str(gpt2), "--split", "1:3")
    model = adapted(split_of(gpt2, daemon.address), lora(gpt2, lora_dropout=0.3)).eval()
    batch = next(batches(1))
    dropout = "base_model.model.transformer.h.1.attn.c_attn.lora_dropout.default"
    with torch.no_grad():
        quiet = model(**batch).logits
        model.get_submodule(dropout).train()
        with pytest.raises(AdapterError, match="accepted is one mode for all"):
            model(**batch)
        assert torch.equal(model.eval()(**batch).logits, quiet)


def test_the_client_s_generator_moves_as_with_the_whole_model(pair: tuple[Any, Any]) -> None:
    states = []
    for model in pair:
        torch.manual_seed(3)
        trained(model, 2)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fresh_magnitudes_of_dora_are_the_trunk_s_own(
    family: str, trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    """Without the matrices that they are the norms of."""
    folder = save_tiny_model(family, tmp_path / "model", num_hidden_layers=4)
    address = trunkd("--model", str(folder), "--split", "1:3").address
    models = (split_of(folder, address), load(folder))
    ours, theirs = (adapted(model, lora(folder, use_dora=True)) for model in models)
    assert_same(ours, theirs)
    assert trained(ours) == trained(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_matrices_are_given_where_the_host_serves_them(
    family: str, trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", num_hidden_layers=4)
    flags = ("--model", str(folder), "--split", "1:3")
    config = lora(folder, modules_to_save=["c_fc", "up_proj"])
    with pytest.raises(SharedWeightsError, match="--serve-weights"):
        adapted(split_of(folder, trunkd(*flags).address), config)
    served = split_of(folder, trunkd(*flags, "--serve-weights").address)
    ours, theirs = adapted(served, config), adapted(load(folder), config)
    assert_same(ours, theirs)
    assert trained(ours) == trained(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_client_that_has_the_blocks_itself_reads_them_there(
    family: str, trunkd: Start, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", num_hidden_layers=4)
    write_split_layout(folder, SplitRange(1, 3), tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "trunk")
    daemon = trunkd("--model", str(folder), "--split", "1:3")
    config = lora(folder, modules_to_save=["c_fc", "up_proj"])
    with pytest.raises(SharedWeightsError, match="--serve-weights"):
        SplitModelForCausalLM.from_pretrained(
            tmp_path / "parts", daemon.address, peft_config=copy.deepcopy(config)
        )
    torch.manual_seed(1)
    ours = SplitModelForCausalLM.from_pretrained(
        folder, daemon.address, peft_config=copy.deepcopy(config)
    ).train()
    theirs = adapted(load(folder), config)
    assert_same(ours, theirs)
    assert trained(ours) == trained(theirs)
    assert_same(ours, theirs)
    ours.base_model.model.remote_trunk.close()


def test_adapters_that_travel_in_bfloat16_are_computed_with_so(gpt2: Path, trunkd: Start) -> None:
    """The client's own are in full: as if the whole model's blocks had rounded copies of them."""
    daemon = trunkd("--model", str(gpt2), "--split", "1:3")
    ours = SplitModelForCausalLM.from_pretrained(
        gpt2, daemon.address, peft_config=lora(gpt2), seed=1, adapter_wire_format="bfloat16"
    ).train()
    theirs = adapted(load(gpt2), lora(gpt2))
    rounded = [
        p
        for n, p in theirs.named_parameters()
        if p.requires_grad and (".h.1." in n or ".h.2." in n)
    ]
    kept = [p.detach().clone() for p in rounded]
    optimizers = [torch.optim.SGD(trainable(m), lr=0.1) for m in (ours, theirs)]
    for batch in batches(3):
        for parameter, value in zip(rounded, kept, strict=True):
            parameter.data.copy_(value.bfloat16())
        losses = [model(**batch).loss for model in (ours, theirs)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for parameter, value in zip(rounded, kept, strict=True):
            assert parameter.grad is not None
            parameter.grad = parameter.grad.bfloat16().float()
            parameter.data.copy_(value)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        kept = [p.detach().clone() for p in rounded]
    assert_same(ours, theirs)
    ours.base_model.model.remote_trunk.close()


def test_a_host_says_which_methods_it_takes(gpt2: Path, trunkd: Start, split_of: Open) -> None:
    flags = ("--model", str(gpt2), "--split", "1:3", "--peft-methods", '["IA3"]')
    model = adapted(split_of(gpt2, trunkd(*flags).address), lora(gpt2))
    with pytest.raises(AdapterError, match="does not accept LORA; accepted: IA3"):
        model(**next(batches(1)))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_session_and_weights_of_its_own(
    how: Callable[[Any], Any], pair: tuple[Any, Any]
) -> None:
    ours, theirs = pair
    trained(ours, 1)
    trained(theirs, 1)
    copied, other = how(ours), how(theirs)
    sessions = {m.base_model.model.passage.function.session.session_id for m in (ours, copied)}
    assert len(sessions) == 2
    assert trained(ours) == trained(theirs)
    batch = next(batches(1, seed=6))
    with torch.no_grad():
        assert torch.equal(copied(**batch).logits, other(**batch).logits)
        assert not torch.equal(copied(**batch).logits, ours(**batch).logits)
    assert trained(copied) == trained(other)
    assert_same(copied, other)
    copied.base_model.model.passage.function.close()
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


def test_a_dropped_model_ends_its_session(gpt2: Path, trunkd: Start, split_of: Open) -> None:
    daemon = trunkd("--model", str(gpt2), "--split", "1:3")
    function = split_of(gpt2, daemon.address).passage.function
    ended = threading.Event()
    function.session.close = ended.set
    function = type(function)(function.session, {}, torch.float32)
    del function
    gc.collect()
    assert ended.wait(PATIENCE_S)


def test_a_saved_bare_model_is_one_of_ends_alone(
    gpt2: Path, trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    daemon = trunkd("--model", str(gpt2), "--split", "1:3")
    ours = split_of(gpt2, daemon.address)
    with torch.no_grad():
        next(ours.parameters()).add_(0.1)
    ours.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trunkline_ends"):
        load(tmp_path / "saved")  # with random numbers in the trunk's blocks, it would be
    again = split_of(tmp_path / "saved", daemon.address)
    ids = next(batches(1))["input_ids"]
    assert torch.equal(again(ids).logits, ours(ids).logits)
    with pytest.raises(InvalidInputError, match="accepted is generate"):
        ours.generate_batch([ids[0].tolist()])


def test_a_method_that_moves_its_values_in_a_forward_is_refused(
    trunkd: Start, split_of: Open, tmp_path: Path
) -> None:
    """The trunk's would be moved, the client's not; what was there before still works."""
    folder = save_tiny_model("llama", tmp_path / "model", num_hidden_layers=4)
    daemon = trunkd("--model", str(folder), "--split", "1:3")
    split, batch = split_of(folder, daemon.address), next(batches(1))
    with torch.no_grad():
        expected = split(**batch).logits
    config = OFTConfig(r=4, oft_block_size=0, coft=True, target_modules=["q_proj"])
    constrained = adapted(split, config)
    with pytest.raises(AdapterError, match="writes"), torch.no_grad():
        constrained(**batch)
    with torch.no_grad():
        assert torch.equal(constrained.unload()(**batch).logits, expected)


def test_a_copied_cache_is_a_fork(pair: tuple[Any, Any]) -> None:
    texts = []
    for model in pair:
        prefix = torch.tensor([[5, 9, 30, 7]])
        with torch.no_grad():
            cache = model.eval()(input_ids=prefix, use_cache=True).past_key_values
        for token in (40, 50):
            ids = torch.cat([prefix, torch.tensor([[token]])], dim=1)
            forked = copy.deepcopy(cache)
            texts.append(model.generate(input_ids=ids, past_key_values=forked, max_new_tokens=6))
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3])
    assert not torch.equal(texts[0], texts[1])


def test_what_would_be_other_is_refused_by_name(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    batch = next(batches(1))
    block = "base_model.model.transformer.h.1"
    layer = ours.get_submodule(f"{block}.attn.c_attn")
    hook = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(AdapterError, match=r"h\.1\.attn\.c_attn was given a hook"):
        ours(**batch)
    hook.remove()
    loss = ours(**batch).loss
    with torch.no_grad():
        next(p for n, p in ours.named_parameters() if ".h.1." in n and "lora_B" in n).data.add_(1)
    with pytest.raises(AdapterError, match="was written between forward and backward"):
        loss.backward()
    ours.set_attn_implementation("eager")  # whose second derivatives torch has
    loss = ours(**batch).loss
    within = next(p for n, p in ours.named_parameters() if ".h.1." in n and "lora_B" in n)
    (first,) = torch.autograd.grad(loss, [within], create_graph=True)
    with pytest.raises(AdapterError, match="second order"):
        first.sum().backward()
    with pytest.raises(SharedWeightsError, match="its tenants share"):
        ours.merge_adapter()
    ours.get_parameter(f"{block}.mlp.c_fc.base_layer.weight").requires_grad_(True)
    with pytest.raises(AdapterError, match="is to be trained"):
        ours(**batch)


def test_gradients_do_not_pass_a_cache(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    ids = torch.tensor([[5, 9, 30, 7]])
    with torch.no_grad():
        cache = ours(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ProtocolError, match="gradients do not pass a cache"):
        ours(input_ids=ids[:, :1], past_key_values=cache)
