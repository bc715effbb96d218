"""Data parallel training by torch's own: two processes, a session each, one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from client_service import SplitModelForCausalLM
from tests.conftest import Daemon
from tests.models import VOCAB

RANKS = 2
STEPS = 3


def config() -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["c_attn", "c_fc"],
        fan_in_fan_out=True,
        modules_to_save=["ln_f"],
    )


def batches(rank: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        yield torch.randint(3, VOCAB, (2, 12), generator=generator)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def train_rank(rank: int, folder: Path, model: Path, address: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    torch.manual_seed(rank)  # DDP gives all ranks what the first has drawn
    split = SplitModelForCausalLM.from_pretrained(model, address, peft_config=config()).train()
    parallel = DistributedDataParallel(split)
    optimizer = optimizer_of(parallel)
    for ids in batches(rank):
        parallel(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(weights(split), folder / f"rank{rank}.pt")
    split.base_model.model.remote_trunk.close()
    distributed.destroy_process_group()


def train_whole(model: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config()).train()
    optimizer = optimizer_of(whole)
    for pair in zip(*(batches(rank) for rank in range(RANKS)), strict=True):
        for ids in pair:
            (whole(input_ids=ids, labels=ids).loss / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(whole)


def test_two_ranks_train_as_one_process_on_both_batches(
    tiny_gpt2: Path, trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), "--threads", "1")
    arguments = (tmp_path, tiny_gpt2, daemon.address)
    multiprocessing.spawn(train_rank, arguments, nprocs=RANKS)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS))
    torch.set_num_threads(1)
    expected = train_whole(tiny_gpt2)
    assert list(first) == list(second) == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], parameter), name
