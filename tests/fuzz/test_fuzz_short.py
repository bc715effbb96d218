"""A few scripts of the fuzzer in every run of the tests; `python -m tests.fuzz` plays more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz.campaign import Campaign, generate
from tests.fuzz.script import read_scripts, write_scripts
from tests.fuzz.watch import Watch, start_trunk
from tests.patience import PATIENCE_S

SEED = 20_240_607
SCRIPTS = 20


def test_no_malformed_stream_harms_the_trunk_or_its_other_client(tmp_path: Path) -> None:
    daemon = start_trunk(tmp_path)
    watch = Watch(daemon)
    try:
        report = Campaign(daemon.address, watch, SEED, tmp_path).run(scripts=SCRIPTS)
    finally:
        watch.close()
        daemon.process.terminate()
    assert daemon.process.wait(timeout=PATIENCE_S) == 0
    assert report.faults == [], json.dumps(report.as_json(), indent=1)
    assert report.bystander_rounds > 0 and report.scripts == SCRIPTS


@pytest.mark.parametrize("number", range(20))
def test_a_script_is_replayed_as_it_was(number: int, tmp_path: Path) -> None:
    script = generate(SEED, number)
    assert generate(SEED, number) == script
    write_scripts(tmp_path / "fault.json", {"seed": SEED}, [script])
    assert read_scripts(tmp_path / "fault.json") == [script]
