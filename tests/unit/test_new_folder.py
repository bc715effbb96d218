"""What is written as a folder is there whole or not at all, whichever write the disk refuses."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from client_service import certificates
from client_service.certificates import write_certificates
from shared.bundled import model_dir
from shared.errors import CheckpointError, InvalidInputError
from shared.models import SplitRange, open_checkpoint, split_layout
from shared.models.split_layout import write_split_layout
from shared.new_folder import check_writable, new_folder
from tests.models import save_tiny_model

_LARGEST_FILE = 100


class FullDisk:
    """From a given write on, the system lets no file grow, as with a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self._left = monkeypatch, -1
        self.reached = 0

    def watch(self, target: Any, name: str) -> None:
        real = getattr(target, name)

        def write(*args: Any, **kwargs: Any) -> Any:
            self.reached += 1
            self._left -= 1
            if self._left == 0:
                limit(_LARGEST_FILE)
            return real(*args, **kwargs)

        self._monkeypatch.setattr(target, name, write)

    def at(self, write: int) -> None:
        """At the write of this number, from 1 on; 0 takes the fault away."""
        limit(resource.RLIM_INFINITY)
        self._left, self.reached = write, 0


def limit(size: int) -> None:
    """The largest size of a file; Python ignores the signal, so that a write fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FullDisk]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield FullDisk(monkeypatch)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model("gpt2", tmp_path_factory.mktemp("whole") / "gpt2")
    AutoTokenizer.from_pretrained(model_dir()).save_pretrained(folder)
    return folder


WRITES = 3 * 2 + 1
"""Of three parts weights and metadata, and the tokenizer."""


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_a_full_disk_leaves_nothing_of_a_split_and_the_next_try_works(
    number: int, is_there: bool, whole: Path, full_disk: FullDisk, tmp_path: Path
) -> None:
    for target, name in (
        (split_layout, "save_file"),
        (Path, "write_text"),
        (split_layout, "_copy_tokenizer"),
    ):
        full_disk.watch(target, name)
    out = tmp_path / "made" / "parts"
    if is_there:
        out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    full_disk.at(number)
    with pytest.raises(CheckpointError, match=r"parts: was not written .*File too large"):
        write_split_layout(whole, SplitRange(2, 10), out)
    assert full_disk.reached == number
    assert sorted(tmp_path.rglob("*")) == before
    full_disk.at(0)
    files = write_split_layout(whole, SplitRange(2, 10), out)
    assert full_disk.reached == WRITES and all(file.is_file() for file in files.values())
    assert [path.name for path in out.parent.iterdir()] == ["parts"]
    assert not list(out.glob(".*"))
    parts, one = open_checkpoint(out), open_checkpoint(whole)
    assert all(torch.equal(parts.read(name), one.read(name)) for name in one.names())
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(whole))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_leaves_no_certificates(
    number: int, full_disk: FullDisk, tmp_path: Path
) -> None:
    full_disk.watch(certificates, "_write_folder")
    out = tmp_path / "pki"
    full_disk.at(number)
    with pytest.raises(InvalidInputError, match="written"):
        write_certificates(out, tenants=["alice"])
    assert list(tmp_path.iterdir()) == []
    full_disk.at(0)
    write_certificates(out, tenants=["alice"])
    before = sorted(out.rglob("*"))
    full_disk.at(2)
    with pytest.raises(InvalidInputError, match="clients/carol: cannot be written"):
        write_certificates(out, tenants=["bob", "carol"])
    assert sorted(out.rglob("*")) == before
    full_disk.at(0)
    assert write_certificates(out, tenants=["bob", "carol"]) == [
        out / "clients/bob",
        out / "clients/carol",
    ]


def test_any_other_error_leaves_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    long = tmp_path / ("a" * 300)
    for place in (tmp_path / "file", tmp_path / "file" / "under", long, tmp_path / "b" / long.name):
        with pytest.raises(CheckpointError, match="cannot be written to"):
            check_writable(place)
        with pytest.raises(CheckpointError), new_folder(place):
            pytest.fail("was begun")
    check_writable(tmp_path / "c" / "d")
    check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
