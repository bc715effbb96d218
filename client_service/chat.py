"""A conversation with a causal LM, split or whole, on standard input and output.

Every turn reads the whole conversation again: what a chat template makes of it need not begin with
what it made of the turns before, and a cache that was continued would round differently.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

import torch
from jinja2 import TemplateError
from transformers import TextStreamer

from client_service.model_limits import check_vocabulary, unknown_token
from shared.errors import InvalidInputError

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  what `input` edits lines with

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it."

_USER, _MODEL = "User:", "Assistant:"
_STOP = f"\n{_USER}"
_LEAST_ROOM = 4
"""A full conversation leaves at least a fourth of the positions to the reply."""


@dataclass(frozen=True)
class ChatOptions:
    """How replies are made."""

    system: str = ""
    """Comes before the conversation; empty for what the chat template has by itself."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Samples from the k likeliest; 0: from all."""
    seed: int = 0
    """Of every conversation."""


def chat(
    model: Any,
    tokenizer: Any,
    options: ChatOptions | None = None,
    source: TextIO | None = None,
    sink: TextIO | None = None,
    notes: TextIO | None = None,
) -> None:
    """Reads lines and streams replies until the input ends.

    Args:
        model: Split or whole; put in evaluation mode meanwhile.
        tokenizer: Its chat template is used if it has one, else a plain transcript.
        options: How replies are made.
        source: Lines of the user; standard input by default.
        sink: Replies, each ended by a line break; standard output by default.
        notes: What else there is to say; standard error by default.

    Raises:
        InvalidInputError: If the system text cannot begin a conversation (:func:`check_opening`).
        TrunklineError: What the trunk answered, if it refused.
    """
    source, sink, notes = source or sys.stdin, sink or sys.stdout, notes or sys.stderr
    talk = Conversation(model, tokenizer, options or ChatOptions(), sink, notes)
    talk.reset()
    was_training = model.training
    model.eval()
    try:
        notes.write(f"{HELP}\n")
        with _remembered_interrupts() as talk.interrupted:
            while (line := _read(source, notes)) not in (None, "/quit"):
                if line == "/reset":
                    talk.reset()
                elif line:
                    talk.answer(line)
                if talk.interrupted.is_set():
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        sink.write("\n")
    finally:
        model.train(was_training)
        sink.flush()


@dataclass
class Conversation:
    """The turns so far, and how the next is made of them."""

    model: Any
    tokenizer: Any
    options: ChatOptions
    sink: TextIO
    notes: TextIO
    turns: list[dict[str, str]] = field(default_factory=list)
    """User and assistant by turns."""
    interrupted: threading.Event = field(default_factory=threading.Event)
    """Set by Ctrl-C."""

    def reset(self) -> None:
        """Begins anew.

        Raises:
            InvalidInputError: If the system text cannot begin a conversation.
        """
        self.turns.clear()
        torch.manual_seed(self.options.seed)
        check_opening(self.tokenizer, self.options.system, self.model.config, self._positions)

    def answer(self, text: str) -> str:
        """Streams the reply to one line of the user and remembers both.

        Returns:
            The reply; empty if the line is too long for the model, which is then said.
        """
        self.turns.append({"role": "user", "content": text})
        inputs = self._fitting()
        if inputs is None:
            self.turns.pop()
            return ""
        prompt_tokens = inputs["input_ids"].shape[1]
        stop = None if self._has_template else _STOP
        streamer = _Reply(self.tokenizer, self.sink, stop, self.interrupted)
        self.model.generate(
            **inputs,
            max_new_tokens=min(self.options.max_new_tokens, self._positions - prompt_tokens),
            streamer=streamer,
            **self._sampling(),
        )
        self.turns.append({"role": "assistant", "content": streamer.text.strip()})
        return streamer.text

    @property
    def _has_template(self) -> bool:
        return has_template(self.tokenizer)

    @property
    def _positions(self) -> int:
        """Tokens the model has positions for, less an adapter's virtual ones."""
        positions = int(self.model.config.max_position_embeddings)
        adapters = getattr(self.model, "peft_config", {}).values()
        return positions - max(
            (getattr(a, "num_virtual_tokens", None) or 0 for a in adapters), default=0
        )

    def _fitting(self) -> Any:
        """The input, without the oldest turns if they leave no room; None if nothing fits."""
        room = min(self.options.max_new_tokens, self._positions // _LEAST_ROOM)
        dropped = 0
        while True:
            inputs = encode(self.tokenizer, self.options.system, self.turns)
            tokens = inputs["input_ids"].shape[1]
            if tokens + room <= self._positions or len(self.turns) == 1:
                break
            del self.turns[:2]
            dropped += 1
        if dropped:
            self.notes.write(
                f"[the model has {self._positions} positions: the oldest {dropped} "
                f"turn{'s' if dropped > 1 else ''} dropped]\n"
            )
        if tokens >= self._positions:
            self.notes.write(
                f"[{tokens} tokens with this line, the model has {self._positions} positions: "
                f"shorten it]\n"
            )
            return None
        if unknown := unknown_token(inputs["input_ids"], self.tokenizer, self.model.config):
            self.notes.write(f"[{unknown}: leave it out]\n")
            return None
        return inputs

    def _sampling(self) -> dict[str, Any]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id}
        ends |= set(configured) if isinstance(configured, list) else {configured}
        chosen: dict[str, Any] = {
            "do_sample": self.options.temperature > 0,
            "num_beams": 1,
            "eos_token_id": sorted(e for e in ends if e is not None) or None,
        }
        if self.options.temperature > 0:
            chosen.update(temperature=self.options.temperature, top_k=self.options.top_k)
        if not self._has_template:
            chosen.update(stop_strings=[_STOP], tokenizer=self.tokenizer)
        return chosen


class _Reply(TextStreamer):  # type: ignore[misc]
    """Writes a reply as its words come, up to what would begin the user's next line."""

    def __init__(
        self, tokenizer: Any, sink: TextIO, stop: str | None, interrupted: threading.Event
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._all = ""
        self._sink = sink
        self._stop = stop
        self._interrupted = interrupted
        self._written = 0

    def put(self, value: torch.Tensor) -> None:
        """Called by ``generate`` with the prompt, and with every new token."""
        if self._interrupted.is_set():
            raise KeyboardInterrupt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the streamer with text that will not change any more."""
        self._all += text
        self.text = self._all if self._stop is None else self._all.split(self._stop)[0]
        held = 0 if stream_end else self._undecided()
        self._sink.write(self.text[self._written : len(self.text) - held])
        self._written = max(self._written, len(self.text) - held)
        if stream_end:
            self._sink.write("\n")
        self._sink.flush()

    def _undecided(self) -> int:
        """Length of the end of the text that may turn out to begin the stop string."""
        stop = self._stop or ""
        return next((n for n in range(len(stop), 0, -1) if self.text.endswith(stop[:n])), 0)


@contextlib.contextmanager
def _remembered_interrupts() -> Iterator[threading.Event]:
    """Ctrl-C raises KeyboardInterrupt as ever and sets the event.

    The exception alone can be lost: it is raised wherever the main thread is, and native code and
    bare ``except`` clauses of libraries clear what was raised inside them.
    """
    came = threading.Event()

    def remember(number: int, frame: FrameType | None) -> None:
        came.set()
        signal.default_int_handler(number, frame)

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not is_ours:
        yield came  # whoever set another handler decides what Ctrl-C does
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer says how turns are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, system: str, turns: list[dict[str, str]]) -> Any:
    """What a model reads before it replies to the last of the turns."""
    if not has_template(tokenizer):
        return tokenizer(_transcript(system, turns), return_tensors="pt", verbose=False)
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.apply_chat_template(
        [*messages, *turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def check_opening(tokenizer: Any, system: str, config: Any, positions: int) -> None:
    """Refuses a system text that a conversation cannot begin with; needs no model.

    Args:
        tokenizer: Of the model.
        system: May be empty.
        config: Of the model.
        positions: Tokens that there is room for.

    Raises:
        InvalidInputError: If the chat template has no place for it, or the model none.
        DataError: If the model lacks a token of it.
    """
    try:
        ids = encode(tokenizer, system, [{"role": "user", "content": "?"}])["input_ids"]
    except TemplateError as error:
        raise InvalidInputError(
            f"--system: this model's chat template has no place for it ({error})"
        ) from error
    if ids.shape[1] >= positions:
        raise InvalidInputError(
            f"--system: {ids.shape[1]} tokens with the shortest question; the model has "
            f"{positions} positions"
        )
    check_vocabulary(ids, tokenizer, config)


def _transcript(system: str, turns: list[dict[str, str]]) -> str:
    names = {"user": _USER, "assistant": _MODEL}
    lines = [f"{system}\n"] if system else []
    lines += [f"{names[turn['role']]} {turn['content']}" for turn in turns]
    return "\n".join([*lines, _MODEL])


def _read(source: TextIO, notes: TextIO) -> str | None:
    """The next line without the spaces around it; None at the end."""
    if source is sys.stdin and source.isatty() and sys.stdout.isatty():
        try:
            return input("> ").strip()  # with the terminal's line editing
        except EOFError:
            return None
    if source.isatty():
        notes.write("> ")
        notes.flush()
    line = source.readline()
    return line.strip() if line else None
