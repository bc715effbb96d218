"""Dropout of the trunk's blocks: by a key and a block's index, without waiting for others."""

from __future__ import annotations

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from client_service.dropout_key import SECRET_BYTES, dropout_key, user_secret
from shared.errors import InvalidInputError, ProtocolError
from shared.models import get_part_class, load_part
from tests.models import save_tiny_model
from tests.patience import PATIENCE_S
from trunk_service.keyed_draws import keyed_draws

CPU = torch.device("cpu")
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
DROPOUT = {
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "n_layer": 6},
    "llama": {"attention_dropout": 0.3},
}


@pytest.fixture(scope="module", params=DROPOUT)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: str = request.param
    return save_tiny_model(family, tmp_path_factory.mktemp(family) / "m", **DROPOUT[family])


def part(folder: Path, start: int, end: int) -> Any:
    family = "gpt2" if "gpt2" in str(folder) else "llama"
    return load_part(get_part_class(family, "trunk"), folder, start_layer=start, end_layer=end)


def run(model: Any, key: bytes = KEY, hidden: torch.Tensor | None = None) -> torch.Tensor:
    hidden = torch.ones(2, 5, 64) if hidden is None else hidden
    with keyed_draws(model.train(), key, CPU):
        output: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return output.detach()


def test_a_key_gives_the_same_masks_whatever_else_is_drawn(folder: Path) -> None:
    model = part(folder, 1, 4)
    torch.manual_seed(1)
    first = run(model)
    torch.rand(17)
    state = torch.get_rng_state()
    assert torch.equal(run(model), first)
    assert torch.equal(torch.get_rng_state(), state), "the process's generator was used"
    assert not torch.equal(run(model, OTHER), first)


def test_any_cut_gives_the_same_masks(folder: Path) -> None:
    whole = run(part(folder, 1, 5))
    assert torch.equal(run(part(folder, 3, 5), hidden=run(part(folder, 1, 3))), whole)


def test_blocks_have_masks_of_their_own(folder: Path) -> None:
    first, second = part(folder, 1, 2), part(folder, 2, 3)
    second.load_state_dict({n.replace("1.", "2.", 1): t for n, t in first.state_dict().items()})
    for other in second.modules():
        if hasattr(other, "scaling") and "gpt2" in str(folder):
            assert other.scaling  # the same function but for the masks
    assert not torch.equal(run(first), run(second))


def test_two_forwards_are_inside_a_block_at_once(folder: Path) -> None:
    models = [part(folder, 1, 3) for _ in range(2)]
    alone = [run(model, key) for model, key in zip(models, (KEY, OTHER), strict=True)]
    barrier = threading.Barrier(2)

    def meet(*_: Any) -> None:
        barrier.wait(PATIENCE_S)

    for model in models:
        for block in getattr(model.base, model.family.layers):
            block.register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, models, (KEY, OTHER)))
    assert all(map(torch.equal, together, alone))


def test_a_key_of_another_length_is_refused(folder: Path) -> None:
    with (
        pytest.raises(ProtocolError, match="7 bytes"),
        keyed_draws(part(folder, 1, 2), b"x" * 7, CPU),
    ):
        pass


def test_a_secret_is_made_once_and_is_the_user_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "made" / "secret"
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(user_secret, [path] * 8))
    assert len(found) == 1 and len(next(iter(found))) == SECRET_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["secret"]
    path.write_bytes(b"short")
    with pytest.raises(InvalidInputError, match="5 bytes are no secret"):
        user_secret(path)
    with pytest.raises(InvalidInputError, match="TRUNKLINE_DROPOUT_SECRET"):
        user_secret(tmp_path / "made" / "secret" / "below")


def test_keys_follow_torch_s_generator_and_the_secret() -> None:
    def two(secret: bytes) -> list[bytes]:
        torch.manual_seed(3)
        return [dropout_key(secret), dropout_key(secret)]

    first, second = two(KEY)
    assert first != second and two(KEY) == [first, second]
    assert set(two(OTHER)).isdisjoint({first, second})
