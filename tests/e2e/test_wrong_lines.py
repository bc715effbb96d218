"""A wrong command line ends in one line that names it, before anything is loaded or connected."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from client_service.cli import main
from client_service.cli.run_file import RunSettings
from client_service.credentials import TLS_VARIABLE, TOKEN_VARIABLE
from client_service.model_limits import check_block_length
from shared.bundled import model_dir
from shared.errors import InvalidInputError
from tests.models import GPT2, OTHERS
from tests.patience import PATIENCE_S
from trunk_service.__main__ import main as trunkd

pytestmark = pytest.mark.e2e

BIN = Path(sys.executable).parent
LONG = "a" * 300
HUGE = "1" + "0" * 30


@pytest.fixture
def trunk() -> Iterator[socket.socket]:
    """Listens, and was connected to by nobody when the test is over."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without a single weight, so that loading one is another error; and odd files."""
    folder = tmp_path_factory.mktemp("place")
    for name, words in (("model", GPT2 | {"vocab_size": 1536}), ("small", GPT2)):
        AutoConfig.for_model("gpt2", **words).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(model_dir()).save_pretrained(folder / name)
        save_file({}, folder / name / "model.safetensors")
    (folder / "no-tokenizer").mkdir()
    AutoConfig.for_model("gpt2", **GPT2).save_pretrained(folder / "no-tokenizer")
    save_file({}, folder / "no-tokenizer" / "model.safetensors")
    (folder / "no-tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "odd-config").mkdir()
    (folder / "odd-config" / "config.json").write_text('{"model_type": "gpt2", "n_embd": "x"}')
    (folder / "text.txt").write_text("Once there was a dog. " * 200)
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "latin.json").write_bytes(b'{"peft_type": "LORA", "x": "\xe9"}')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "no-texts").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "mine").touch()
    return folder


@pytest.fixture
def line(
    trunk: socket.socket,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., str]]:
    """Runs a command line in this process; gives the one line that it ends with."""
    for variable in (TLS_VARIABLE, TOKEN_VARIABLE):
        monkeypatch.setenv(variable, "")
    monkeypatch.chdir(place)
    verbosity = transformers_logging.get_verbosity()

    def run(*arguments: object, stdin: bytes = b"") -> str:
        address = f"127.0.0.1:{trunk.getsockname()[1]}"
        words = [str(a).replace("TRUNK", address) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["trunkline", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        before = sorted(place.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert ended.value.code == 2, said.err
        assert said.out == "" and said.err.startswith("trunkline: ")
        assert said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
        assert sorted(place.rglob("*")) == before
        return said.err

    yield run
    transformers_logging.set_verbosity(verbosity)


TRAIN = ["train", "--model", "model", "--trunk", "TRUNK", "--data", "text.txt", "--out", "out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "nan"], "--lr nan: accepted is a number from 0 to 3.4"),
        (["--lr", "-1"], "--lr -1: accepted is a number from 0"),
        (["--lr", "inf"], "--lr inf: accepted is a number from 0"),
        (["--lr", "fast"], "--lr fast: accepted is a number from 0"),
        (["--seed", "-1"], "--seed -1: accepted is a whole number from 0 to 18446744073709551615"),
        (["--seed", str(2**64)], "accepted is a whole number from 0 to 18446744073709551615"),
        (["--seed", "1.5"], "--seed 1.5"),
        (["--grad-clip", "-1"], "--grad-clip -1: accepted is a number of at least 0"),
        (["--grad-clip", "nan"], "--grad-clip nan"),
        (["--grad-accum", "0"], "--grad-accum 0"),
        (["--steps", "0"], "--steps 0: accepted is a whole number from 1"),
        (["--steps", HUGE], f"--steps {HUGE}: accepted is a whole number from 1 to 2147483647"),
        (["--warmup-steps", "-1"], "--warmup-steps -1"),
        (["--checkpoint-every", "-1"], "--checkpoint-every -1"),
        (["--keep-last", "0"], "--keep-last 0"),
        (["--micro-batches", "0"], "--micro-batches 0"),
        (["--batch-size", HUGE], f"--batch-size {HUGE}"),
        (["--dropout", "nan"], "--dropout nan: accepted is a number from 0 to 0.99"),
        (["--dropout", "1"], "--dropout 1"),
        (["--threads", "-1"], "--threads -1: accepted is a whole number from 0 to 1024"),
        (["--threads", "1000000"], "--threads 1000000"),
        (["--reconnect-timeout", "nan"], "--reconnect-timeout nan"),
        (["--max-wire-drift", "nan"], "--max-wire-drift nan: accepted is a number above 0"),
        (["--max-wire-drift", "0"], "accepted is a number above 0"),
        (["--wire-format", "int4"], "'int4' is unknown; accepted: float32"),
        (["--gradient-wire-format", ""], "'' is unknown; accepted: float32"),
        (["--adapter-wire-format", "int4"], "'int4' is unknown; accepted: float32"),
        (["--quantize", "int3"], "'int3' is not known; accepted: nf4, int8"),
        (["--optimizer", "lion"], "--optimizer lion: accepted: adamw, sgd, adafactor"),
        (["--peft", "magic"], "--peft magic: accepted: lora"),
        (["--peft", "adalora", "--steps", "5"], "accepted are 10 or more"),
        (["--peft", "prefix", "--trunk-peft", "none"], "PREFIX_TUNING on some parts"),
        (["--peft", "prompt", "--peft-parts", "top"], "PROMPT_TUNING without the bottom"),
        (["--peft-parts", "trunk", "--trunk-peft", "none"], "nothing is left"),
        (["--peft-config", "latin.json"], "latin.json: not UTF-8 text (byte 28)"),
        (["--peft-config", "text.txt"], "text.txt: PEFT configuration is not JSON"),
        (["--peft-config", "nowhere"], "nowhere: No such file"),
        (["--peft-config", "."], "Is a directory; accepted is a JSON file"),
        (["--peft-config", ""], "--peft-config '': is empty"),
        (["--adapter", "nowhere"], "adapter_config.json: no such file"),
        (["--adapter", "full", "--peft-config", "latin.json"], "give either"),
        (["--seq-len", "1"], "--seq-len 1: accepted is a whole number from 2"),
        (["--seq-len", "129"], "--seq-len 129: the model has 128 positions; accepted are 2 to 128"),
        (["--seq-len", "120", "--peft", "prompt"], "accepted are 2 to 112"),
        (["--model", "small"], "is beyond the model's vocabulary; accepted are 0 to 511"),
        (["--model", ""], "--model is empty"),
        (["--model", "./nowhere"], "no such model folder"),
        (["--model", LONG], "neither a folder here nor a model of the hub"),
        (["--model", "text.txt"], "text.txt: no such model folder"),
        (["--model", "full"], "no config.json there"),
        (["--model", "odd-config"], "config.json: not a configuration"),
        (["--model", "no-tokenizer"], "no-tokenizer: no tokenizer there"),
        (["--trunk", "localhost"], "'localhost': accepted is HOST:PORT"),
        (["--trunk", "TRUNK,localhost:0"], "'localhost:0': accepted is HOST:PORT"),
        (["--trunk", "::1:5"], "IPv6 address in brackets"),
        (["--trunk", ""], "names no trunk"),
        (["--trunk", "192.0.2.1:5"], "reached with TLS only"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["--data", "empty.txt"], "empty.txt: is empty"),
        (["--data", "latin.txt"], "latin.txt: not UTF-8 text (byte 3)"),
        (["--data", "deep.jsonl"], "deep.jsonl:1: not JSON"),
        (["--data", "half.jsonl"], "half.jsonl:1: half a surrogate pair"),
        (["--data", "no-texts"], "no .txt or .jsonl files"),
        (["--data", "/proc/self/mem.txt"], "no such file"),
        (["--data", LONG], "no such file or folder"),
        (["--data", ""], "--data '': is empty"),
        (["--out", ""], "--out '': is empty"),
        (["--out", LONG], "cannot be written to (File name too long)"),
        (["--out", "text.txt/under"], "cannot be written to (Not a directory)"),
        (["--out", "text.txt"], "cannot be written to (File exists)"),
        (["--out", "/proc/run"], "/proc/run: cannot be written to"),
        (["--resume"], "run.json: no such file"),
        (["--bogus", "1"], "No such option: --bogus"),
        (["stray"], "(stray); see trunkline train --help"),
    ],
)
def test_a_wrong_training_is_refused(
    arguments: list[str], said: str, line: Callable[..., str]
) -> None:
    assert said in line(*TRAIN, *arguments)


MODEL = ["--model", "model", "--trunk", "TRUNK"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["train"], "Missing option '--out'"),
        (["generate", *MODEL], "Missing option '--prompt'"),
        (["generate", *MODEL, "--prompt", ""], "accepted are 1 to 127"),
        (["generate", *MODEL, "--prompt", "dog " * 200], "accepted are 1 to 127"),
        (["generate", *MODEL, "--prompt", "-"], "standard input: not UTF-8 text (byte 0)"),
        (["generate", *MODEL, "--prompt", "\udcff"], "--prompt: not UTF-8 text"),
        (["generate", *MODEL, "--prompt", "a", "--max-new-tokens", "200"], "accepted are 1 to 128"),
        (["generate", *MODEL, "--prompt", "a", "--temperature", "nan"], "--temperature nan"),
        (["generate", *MODEL, "--prompt", "a", "--temperature", "-1"], "accepted are 0 and"),
        (["generate", *MODEL, "--prompt", "a", "--top-k", "-1"], "--top-k -1"),
        (["generate", *MODEL, "--prompt", "a", "--num-beams", "2000"], "accepted are 1 to 1536"),
        (["generate", *MODEL, "--model", "small", "--prompt", "dog"], "beyond the model's vocab"),
        (["chat", *MODEL, "--system", "dog " * 200], "the model has 128 positions"),
        (["chat", *MODEL, "--system", "\udcff"], "--system: not UTF-8 text"),
        (["chat", *MODEL, "--temperature", "inf"], "--temperature inf"),
        (["chat", *MODEL, "--adapter", "full"], "no such file"),
        (["eval", *MODEL, "--seq-len", "129", "--data", "text.txt"], "accepted are 2 to 128"),
        (["eval", *MODEL, "--seq-len", "64", "--data", "empty.txt"], "is empty"),
        (["verify", *MODEL, "--seq-len", "129"], "accepted are 2 to 128"),
        (["verify", *MODEL, "--peft-config", "latin.json"], "not UTF-8"),
        (["verify", *MODEL, "--peft", "prefix", "--peft-parts", "ends"], "accepted is 'all'"),
        (["--tls", "nowhere", "info", "--trunk", "TRUNK"], "nowhere/ca.pem: No such file"),
        (["--token-file", "text.txt", "info", "--trunk", "TRUNK"], "sent inside TLS only"),
        (["info", "--trunk", "TRUNK/x"], "accepted is HOST:PORT"),
        (["split", "--out", "full"], "not an empty folder"),
        (["split", "--out", LONG], "File name too long"),
        (["split", "--out", "out", "--split", "2:99"], "does not fit a model of 12 blocks"),
        (["split", "--out", "out", "--split", "9" * 5000 + ":2"], "not START:END"),
        (["split", "--out", "text.txt/under"], "Not a directory"),
        (["certs", "--out", "text.txt"], "not an empty folder"),
        (["certs", "--out", "full"], "no CA of ours"),
        (["certs", "--out", "out", "--days", "0"], "--days 0"),
        (["certs", "--out", "out", "--host", "a b"], "neither a host's name"),
        (["certs", "--out", "out", "--host", LONG], "neither a host's name"),
        (["certs", "--out", "out", "--tenant", "../up"], "letters, digits"),
        (["export", "nowhere", "--out", "out"], "no such folder"),
        (["export", "", "--out", "out"], "CHECKPOINT '': is empty"),
        (["export", LONG, "--out", "out"], "no such folder"),
        (["export", "full", "--out", "text.txt/under"], "Not a directory"),
        (["from-gguf", "text.txt", "--out", "out"], "not a readable GGUF file"),
        (["from-gguf", "nowhere", "--out", "out"], "nowhere: no such file"),
        (["from-gguf", "text.txt", "--out", "full"], "not an empty folder"),
        (["demo", "--out", "text.txt"], "cannot be written to"),
        (["demo", "--steps", "0"], "--steps 0"),
    ],
)
def test_a_wrong_command_is_refused(
    arguments: list[str], said: str, line: Callable[..., str]
) -> None:
    assert said in line(*arguments, stdin=b"\xff\xfe")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": math.nan}, "--lr nan: accepted is a number from 0"),
        ({"steps": -5}, "--steps -5"),
        ({"seed": 2**64}, "--seed 18446744073709551616"),
        ({"threads": 10**6}, "--threads 1000000"),
        ({"wire_format": "int4"}, "'int4' is unknown"),
        ({"trunk": "nowhere"}, "'nowhere': accepted is HOST:PORT"),
        ({"peft": "magic"}, "--peft magic"),
        ({"optimizer": "lion"}, "is not of a run"),
        ({"seq_len": 129}, "accepted are 2 to 128"),
        ({"data": "nowhere.txt"}, "no such file or folder"),
    ],
)
def test_a_run_that_was_noted_wrong_is_not_resumed(
    changed: dict[str, Any], said: str, place: Path, line: Callable[..., str]
) -> None:
    began = dict.fromkeys(RunSettings.__annotations__) | {
        "model": "model", "trunk": "127.0.0.1:1", "data": "text.txt", "steps": 5, "batch_size": 2,
        "seq_len": 32, "lr": 1e-3, "seed": 0, "optimizer": "adamw", "peft": "lora",
        "peft_parts": "all", "trunk_peft": "same", "dropout": 0.0, "grad_clip": 1.0,
        "grad_accum": 1, "lr_schedule": "constant", "warmup_steps": 0, "checkpoint_every": 0,
        "keep_last": 2, "reconnect_timeout": 0.0, "chat": False, "quantize": "", "threads": 0,
        "fused_loss": False, "onednn": False, "micro_batches": 1, "wire_format": "float32",
        "adapter_wire_format": "float32",
    }  # fmt: skip
    noted = {"format": 1, "arguments": asdict(RunSettings(**began)) | changed, "data_sha256": ""}
    (place / "run").mkdir(exist_ok=True)
    (place / "run" / "run.json").write_text(json.dumps(noted))
    assert said in line("train", "--resume", "--out", "run")


def test_what_torch_takes_is_accepted(line: Callable[..., str]) -> None:
    """Then the last thing that is looked at is what is wrong."""
    edges = ["--lr", "0", "--seed", str(2**64 - 1), "--grad-clip", "inf", "--dropout", "0.99"]
    edges += ["--warmup-steps", "900", "--keep-last", "999", "--reconnect-timeout", "inf"]
    edges += ["--threads", "1024", "--steps", str(2**31 - 1), "--max-wire-drift", "inf"]
    edges += ["--trunk", "[::1]:1,localhost:65535", "--seq-len", "128", "--out", "a/b/c"]
    assert "empty.txt: is empty" in line(*TRAIN, *edges, "--data", "empty.txt")


def test_rotary_positions_have_no_end() -> None:
    check_block_length(AutoConfig.for_model("llama", **OTHERS), 10**6)
    with pytest.raises(InvalidInputError, match="accepted are 2 to 128"):
        check_block_length(AutoConfig.for_model("gpt2", **GPT2), 129)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "0"], "--workers 0: "),
        (["--threads", "1000000", "--workers", "x"], "; --threads 1000000: "),
        (["--held-lease-s", "nan"], "--held-lease-s nan: "),
        (["--drain-timeout-s", "inf"], "--drain-timeout-s inf: "),
        (["--max-sessions", HUGE], f"--max-sessions {HUGE}: "),
        (["--split", "5"], "not START:END"),
        (["--tls", ""], "--tls '': is empty"),
        (["--dtype", "int3"], "--dtype int3: "),
        (["--quantize", "int3"], "--quantize int3: "),
        (["--onednn", "--dtype", "bfloat16"], "it is for plain float32 on a CPU"),
        (["--listen", "localhost"], "HOST:PORT"),
        (["--metrics", "localhost:x"], "HOST:PORT"),
        (["--otlp-endpoint", "::::"], "--otlp-endpoint ::::: accepted is http://HOST:PORT"),
        (["--ready-file", "nowhere/ready.json"], "a file in a folder that exists"),
        (["--peft-methods", "magic"], "['magic'] are not among"),
        (["--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_daemon_is_refused(
    flags: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["trunkd", *flags])
    assert said in daemon_line(capfd)


@pytest.mark.parametrize(
    ("config", "said"),
    [(b"a = [", "not readable as TOML"), (b'model = "\xff"', "TOML"), (b"workrs = 3", "--workrs")],
)
def test_a_wrong_file_of_settings_is_refused(
    config: bytes,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "trunkd.toml").write_bytes(config)
    monkeypatch.setenv("TRUNKD_CONFIG", str(tmp_path / "trunkd.toml"))
    monkeypatch.setattr(sys, "argv", ["trunkd"])
    assert said in daemon_line(capfd)


def daemon_line(capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        trunkd()
    said = capfd.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("trunkd: ") and said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["trunkline", *TRAIN, "--seq-len", "129"], "accepted are 2 to 128"),
        (["trunkd", "--workers", "0"], "--workers 0"),
    ],
)
def test_a_process_says_one_line(
    command: list[str], said: str, place: Path, trunk: socket.socket
) -> None:
    address = f"127.0.0.1:{trunk.getsockname()[1]}"
    done = subprocess.run(
        [str(BIN / command[0]), *(word.replace("TRUNK", address) for word in command[1:])],
        cwd=place,
        env={k: v for k, v in os.environ.items() if k not in (TLS_VARIABLE, TOKEN_VARIABLE)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1
