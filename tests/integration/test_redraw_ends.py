"""What a host finds of the client's seed, and what it does not."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

from client_service import redraw_ends
from client_service.calls import SessionTerms
from client_service.dropout_key import SECRET_VARIABLE, user_secret
from client_service.session import TrunkSession
from client_service.skeleton_model import with_skeleton
from shared.errors import InvalidInputError
from shared.models import SplitRange, open_checkpoint
from shared.skeleton import RemoteTensor
from tests.conftest import Daemon
from tests.proxy import Line, line_to

pytestmark = [
    pytest.mark.filterwarnings("ignore:`loss_type=None`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

# How many seeds the host tries, and the client's.
SEARCHES = [(1_000, 731), pytest.param((100_000, 73_211), marks=pytest.mark.slow)]
searches = pytest.mark.parametrize("search", SEARCHES, ids=str)
Search = tuple[int, int]
TARGET, RANK = "c_proj", 2
FIRST, OF_TRUNK = "transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"
BATCH = {"input_ids": torch.arange(3, 11)[None], "labels": torch.arange(3, 11)[None]}


@pytest.fixture
def host(trunkd: Callable[..., Daemon], tiny_gpt2: Path) -> Iterator[Line]:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    with line_to(daemon.address) as line:
        yield line


@pytest.fixture
def split(
    host: Line, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "dropout_secret"))
    session = TrunkSession(host.address, SessionTerms())
    yield with_skeleton(open_checkpoint(tiny_gpt2), SplitRange(1, 3), session, torch.float32)
    session.close()


def lora(**changes: Any) -> LoraConfig:
    settings = {"r": RANK, "target_modules": [TARGET], "fan_in_fan_out": True}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def fresh(split: Any, config: Any = None, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(split, config or lora()).train()


def ends_half(model: Any) -> torch.Tensor:
    return model.get_submodule(f"base_model.model.{FIRST}").lora_A["default"].weight.detach()


def trunks_half(recorded: Line) -> torch.Tensor:
    """As the host got it."""
    for message, tensors in recorded.messages:
        for number, value in enumerate(message.forward.state.values):
            if any(OF_TRUNK in name and "lora_A" in name for name in value.names):
                return tensors[f"value/{number}"]
    raise AssertionError("no forward brought it")


def drawn(sizes: list[tuple[int, int]], seed: int) -> Iterator[torch.Tensor]:
    """The ``lora_A`` of layers of these sizes, as PEFT draws one after the other."""
    torch.default_generator.manual_seed(seed)
    for inputs, outputs in sizes:
        down, _ = nn.Linear(inputs, RANK, bias=False), nn.Linear(RANK, outputs, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        yield down.weight.detach()


def found_seed(recorded: Line, model: Any, seeds: int) -> tuple[int, torch.Tensor] | None:
    """Plays the host: the seed that gives what it was sent, and what it gives the client's end."""
    sent = trunks_half(recorded)
    config = model.config
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    # Block 0 is the client's: its two c_proj come before the trunk's first.
    sizes = [(width, width), (inner, width), (width, width)]
    with torch.random.fork_rng():
        for guess in range(seeds):
            first, _, third = drawn(sizes, guess)
            if torch.equal(third, sent):
                return guess, first
    return None


@searches
def test_a_plain_seed_shows_the_host_the_ends_fresh_adapter(
    search: Search, host: Line, split: Any
) -> None:
    seeds, seed = search
    model = fresh(split, seed=seed)
    model(**BATCH).loss.backward()
    found = found_seed(host, model, seeds)
    assert found is not None and found[0] == seed
    assert torch.equal(found[1], ends_half(model))


@searches
def test_after_redraw_ends_the_seed_no_longer_gives_it(
    search: Search, host: Line, split: Any
) -> None:
    seeds, seed = search
    model = fresh(split, seed=seed)
    plain, state = ends_half(model).clone(), torch.get_rng_state()
    redraw_ends(model)
    assert torch.equal(torch.get_rng_state(), state)
    model(**BATCH).loss.backward()
    found = found_seed(host, model, seeds)
    # The trunk's half is the seed's still; what else the seed gives is nowhere in the client.
    assert found is not None and torch.equal(found[1], plain)
    ours = {p for n, p in model.named_parameters() if "lora_A" in n and ".h.0." in n}
    assert not any(torch.equal(found[1], p) for p in ours if p.shape == found[1].shape)


@searches
def test_dropout_numbers_show_no_seed(search: Search, host: Line, split: Any) -> None:
    seeds, seed = search
    model = fresh(split, lora(lora_dropout=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.1)  # an adapter that shows nothing
    torch.manual_seed(seed)
    before = len(host.messages)
    model.base_model.model.transformer.h[0].eval()  # so that the key is the first that is drawn
    split.transformer.drop.eval()
    model(**BATCH)
    (key,) = [m.forward.dropout_key for m, _ in host.messages[before:] if m.forward.dropout_key]

    def seeds_of(key_of: Callable[[bytes], bytes]) -> list[int]:
        found = []
        with torch.random.fork_rng():
            for guess in range(seeds):
                torch.default_generator.manual_seed(guess)
                number = int(torch.randint(2**62, ())).to_bytes(8, "little")
                if key_of(number) == key:
                    found.append(guess)
        return found

    assert seeds_of(lambda number: hmac.digest(user_secret(), number, "sha256")) == [seed]
    assert seeds_of(lambda number: hmac.digest(bytes(32), number, "sha256")) == []
    assert key not in [m.forward.dropout_key for m, _ in host.messages[:before]]


CONFIGS = {
    "lora": lora(bias="all", modules_to_save=["lm_head"], use_rslora=True),
    "gaussian": lora(init_lora_weights="gaussian"),
    "adalora": AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=3,
        target_r=2,
        total_step=10,
        target_modules=[TARGET],
        fan_in_fan_out=True,
    ),
    "loha": LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_only_what_the_ends_drew_changes(split: Any, method: str) -> None:
    model = fresh(split, CONFIGS[method])
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad and number % 2 and "lora_B" in name:
            parameter.requires_grad_(False)
    mine = {n: p for n, p in model.named_parameters() if not isinstance(p, RemoteTensor)}
    values = {n: p.detach().clone() for n, p in mine.items()}
    asked = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    redraw_ends(model)
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == asked
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    changed = [name for name, p in mine.items() if not torch.equal(p, values[name])]
    for name in changed:
        was = values[name]
        assert ".h.1." not in name and ".h.2." not in name, "the trunk's half stays"
        assert "default" in name and was.unique().numel() > 1, name
        assert 0.2 < float(mine[name].detach().std() / was.std()) < 5, name
    assert changed
    model(**BATCH).loss.backward()


def test_what_is_not_fresh_is_refused_and_kept(split: Any) -> None:
    model = fresh(split)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**BATCH).loss.backward()
    optimizer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}
    with pytest.raises(InvalidInputError, match="no longer what PEFT begins with"):
        redraw_ends(model)
    found = {n: p for n, p in model.named_parameters() if "lora" in n}
    assert found.keys() == before.keys()
    assert all(torch.equal(found[n], p) for n, p in before.items())


def test_refused_by_name(split: Any) -> None:
    with pytest.raises(InvalidInputError, match="GPT2LMHeadModel: accepted is a PEFT model"):
        redraw_ends(split)
    model = fresh(split)
    with pytest.raises(InvalidInputError, match="'mine': accepted are default"):
        redraw_ends(model, "mine")


def test_prefix_tuning_is_refused(split: Any) -> None:
    model = fresh(split, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InvalidInputError, match="prefix tuning"):
        redraw_ends(model)
