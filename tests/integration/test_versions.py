"""Two ends whose libraries differ: refused by name, or told once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import client_service.session
from client_service.calls import SessionTerms
from client_service.session import TrunkSession
from shared.errors import ModelMismatchError
from shared.versions import check_versions, library_versions
from tests.conftest import Daemon, start_daemon
from tests.patience import PATIENCE_S


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place before all others where the next process finds another version noted."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return str(tmp_path)


def note(place: str, package: str, number: str) -> None:
    folder = Path(place) / f"{package}-{number}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n"
    (folder / "METADATA").write_text(text)


@contextlib.contextmanager
def serving(tmp_path: Path, model: Path) -> Iterator[Daemon]:
    daemon = start_daemon(tmp_path, "--model", str(model), "--split", "1:3", forked=False)
    yield daemon
    daemon.process.terminate()
    assert daemon.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(("package", "number"), [("peft", "0.20.4"), ("transformers", "5.22.1")])
def test_another_minor_version_is_refused(
    tmp_path: Path, tiny_gpt2: Path, other: str, package: str, number: str
) -> None:
    note(other, package, number)
    said = f"client has {package} '{version(package)}', the trunk '{number}'"
    with serving(tmp_path, tiny_gpt2) as daemon:
        with pytest.raises(ModelMismatchError, match=said):
            TrunkSession(daemon.address, SessionTerms(), reconnect_timeout_s=0)
        # A client that does not look is refused by the trunk.
        with pytest.MonkeyPatch.context() as careless:
            careless.setattr(client_service.session, "check_versions", lambda *_: "")
            with pytest.raises(ModelMismatchError, match=said):
                TrunkSession(daemon.address, SessionTerms(), reconnect_timeout_s=0)


def test_another_torch_is_told_once(
    tmp_path: Path, tiny_gpt2: Path, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    note(other, "torch", "2.13.9")
    with serving(tmp_path, tiny_gpt2) as daemon, caplog.at_level(logging.WARNING):
        for _ in range(2):
            TrunkSession(daemon.address, SessionTerms(), reconnect_timeout_s=0).close()
    told = [r.message for r in caplog.records if "torch" in r.message]
    assert len(told) == 1 and "'2.13.9'" in told[0]


def test_what_goes_together() -> None:
    ours = dict(library_versions())
    assert check_versions(ours, ours) == ""
    assert check_versions(ours, ours | {"torch": ours["torch"].partition("+")[0] + "+cu130"}) == ""
    patch = ".".join([*ours["peft"].split(".")[:2], "999"])
    assert check_versions(ours, ours | {"peft": patch}) == ""
    for missing in ("peft", "transformers"):
        with pytest.raises(ModelMismatchError, match=f"{missing} of no known version"):
            check_versions({k: v for k, v in ours.items() if k != missing}, ours)
