"""``trunkline chat`` with a piped conversation, and on a terminal, on a real daemon."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_service import SplitModelForCausalLM
from client_service.chat import ChatOptions
from client_service.chat import chat as talk
from shared.bundled import model_dir
from shared.errors import InvalidInputError
from tests.conftest import Daemon
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

BIN = Path(sys.executable).parent
ASKED = ["Once there was a dog.", "What did it see?"]


def run(text: str | bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    piped = text.encode() if isinstance(text, str) else text
    command = [str(BIN / "trunkline"), *arguments]
    return subprocess.run(command, input=piped, capture_output=True, timeout=PATIENCE_S)


def chat(text: str | bytes, trunk: Daemon, *arguments: str) -> tuple[str, str]:
    done = run(text, "chat", "--trunk", trunk.address, *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def expected_replies(new_tokens: int) -> str:
    """What the whole model says, turn by turn, by an ordinary ``generate``."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()
    transcript, said = "", ""
    for line in ASKED:
        transcript += f"User: {line}\nAssistant:"
        inputs = tokenizer(transcript, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        reply = tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).split("\nUser:")[0]
        said += f"{reply}\n"
        transcript += f" {reply.strip()}\n"
    return said


@pytest.mark.slow
def test_piped_turns_give_the_whole_models_replies(bundled_trunk: Daemon) -> None:
    first, second = ASKED
    said, notes = chat(f"{first}\n\n{second}\n", bundled_trunk, "--max-new-tokens", "24")
    assert said == expected_replies(24)
    assert "Traceback" not in notes and "dropped" not in notes
    script = f"{first}\n/reset\n{first}\n/quit\nnever read\n"
    again, _ = chat(script, bundled_trunk, "--max-new-tokens", "24")
    half = len(again) // 2
    assert again[:half] == again[half:] and said.startswith(again[:half])


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_a_chat_template_says_how_turns_are_written() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).train()
    options = ChatOptions(system="Be kind.", max_new_tokens=12)
    sink, notes = io.StringIO(), io.StringIO()
    talk(model, tokenizer, options, io.StringIO("\n".join(ASKED)), sink, notes)
    assert model.training
    text, said = "<system> Be kind.\n", ""
    for line in ASKED:
        text += f"<user> {line}\n<assistant>"
        inputs = tokenizer(text, return_tensors="pt")
        output = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        reply = tokenizer.decode(new, skip_special_tokens=True)
        said += f"{reply}\n"
        text = f"{text.removesuffix('<assistant>')}<assistant> {reply.strip()}\n"
    assert sink.getvalue() == said
    tokenizer.chat_template = TEMPLATE.replace(
        "{% for",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for",
    )
    with pytest.raises(InvalidInputError, match="--system"):
        talk(model, tokenizer, options, io.StringIO(), sink, notes)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises; what a shell starts in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
def test_control_c_counts_when_its_exception_is_lost(hook: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    tokens = 0

    def swallow(*_: object) -> None:
        nonlocal tokens
        tokens += 1
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    getattr(model, hook)(swallow)
    source, sink, notes = io.StringIO("\n".join(ASKED)), io.StringIO(), io.StringIO()
    talk(model, tokenizer, ChatOptions(max_new_tokens=50), source, sink, notes)
    assert tokens == 1 and source.read() == ASKED[1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_an_adapter_and_a_seed_decide_what_is_said(bundled_trunk: Daemon, tmp_path: Path) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    split = SplitModelForCausalLM.from_pretrained(
        model_dir(), bundled_trunk.address, peft_config=config
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    ids = tokenizer("User: Hello.\nAssistant: ward ward ward", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW([p for p in split.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(25):
        split.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    split.save_pretrained(tmp_path / "adapter")
    split.remote_trunk.close()
    options = ["--max-new-tokens", "3"]
    plain, _ = chat("Hello.\n", bundled_trunk, *options)
    adapted, _ = chat("Hello.\n", bundled_trunk, "--adapter", str(tmp_path / "adapter"), *options)
    assert "ward" in adapted and "ward" not in plain
    options = ["--temperature", "1.5", "--top-k", "50", "--max-new-tokens", "16", "--seed"]
    one, other, repeated = (chat("Hello.\n", bundled_trunk, *options, n)[0] for n in "121")
    assert one == repeated != other


@pytest.mark.slow
def test_a_long_conversation_loses_its_oldest_turns(bundled_trunk: Daemon) -> None:
    text = "The cat sat on the mat and looked at the dog for a while. " * 3 + "\n"
    said, notes = chat(text * 6 + "cat " * 400 + "\n", bundled_trunk, "--max-new-tokens", "40")
    assert "256 positions: the oldest 1 turn dropped" in notes
    assert "with this line, the model has 256 positions: shorten it" in notes
    assert said.strip() and "Traceback" not in notes


@pytest.mark.slow
def test_odd_input_ends_cleanly(bundled_trunk: Daemon) -> None:
    assert chat("", bundled_trunk)[0] == ""
    said, _ = chat(b"\xff\xfe caf\xe9\n", bundled_trunk, "--max-new-tokens", "4")
    assert said.endswith("\n")
    said, _ = chat("no line end", bundled_trunk, "--system", "Be brief.", "--max-new-tokens", "4")
    assert said.strip()


@pytest.mark.slow
def test_training_opens_a_conversation_with_the_live_model(
    bundled_trunk: Daemon, tmp_path: Path
) -> None:
    arguments = ["--trunk", bundled_trunk.address, "--steps", "2", "--seq-len", "32"]
    out = str(tmp_path / "run")
    done = run("Hello.\n", "train", *arguments, "--batch-size", "2", "--out", out, "--chat")
    assert done.returncode == 0, done.stderr.decode()
    facts, end = json.JSONDecoder().raw_decode(done.stdout.decode())
    assert facts["step"] == 2 and done.stdout.decode()[end:].strip()
    live = done.stdout.decode()[end:].removeprefix("\n")
    saved, _ = chat("Hello.\n", bundled_trunk, "--adapter", f"{out}/adapter")
    assert live == saved


@contextmanager
def on_a_terminal(trunk: Daemon, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command with a terminal of its own, up to its first prompt."""
    ours, theirs = pty.openpty()
    command = [str(BIN / "trunkline"), "chat", "--trunk", trunk.address, *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        read_until(ours, b"> ")
        yield process, ours
        assert process.wait(timeout=PATIENCE_S) == 0
    finally:
        process.kill()
        os.close(ours)


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What the terminal shows up to the wanted text; an OSError says that it was closed."""
    seen = b""
    while wanted not in seen:
        assert select([terminal], [], [], PATIENCE_S)[0], f"nothing more after {seen!r}"
        seen += os.read(terminal, 4096)
    return seen


@pytest.mark.slow
def test_a_terminal_is_prompted_and_ended_by_control_d(bundled_trunk: Daemon) -> None:
    with on_a_terminal(bundled_trunk, "--max-new-tokens", "4") as (_, terminal):
        os.write(terminal, b"Hello.\n")
        read_until(terminal, b"> ")
        os.write(terminal, b"\x04")


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")  # a caught signal's default is what a child inherits
def test_control_c_ends_a_reply_and_the_conversation(bundled_trunk: Daemon) -> None:
    with on_a_terminal(bundled_trunk, "--max-new-tokens", "250") as (process, terminal):
        os.write(terminal, b"Once there was a little dog who\n")
        read_until(terminal, b"who\r\n")  # the terminal's echo
        read_until(terminal, b" ")  # the reply has begun
        process.send_signal(signal.SIGINT)
        try:
            said = read_until(terminal, b"Traceback")
        except OSError:  # the terminal closes when the command ends
            said = b""
        assert b"Traceback" not in said
