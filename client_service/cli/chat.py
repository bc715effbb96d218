"""``trunkline chat``."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from client_service.chat import ChatOptions, chat, check_opening
from client_service.cli import app
from client_service.cli.options import (
    DEFAULT_TRUNK,
    AdapterOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TrunkOption,
    adapter_config,
    check_text,
    load_tokenizer,
    model_or_bundled,
    prepare,
)
from client_service.model_limits import virtual_tokens
from client_service.split_model import SplitModelForCausalLM
from shared.models import open_checkpoint


@app.command("chat")
def chat_command(
    model: ModelOption = "",
    trunk: TrunkOption = DEFAULT_TRUNK,
    adapter: AdapterOption = None,
    system: Annotated[str, typer.Option(help="Instructions before the conversation.")] = "",
    max_new_tokens: NewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
) -> None:
    """Talk with a model through the split, line by line; replies stream as they come.

    /reset forgets the conversation; /quit, Ctrl-D and Ctrl-C end. When the conversation grows
    longer than the model's positions, its oldest turns are dropped.
    """
    prepare(threads)
    model = model_or_bundled(model)
    tokenizer = load_tokenizer(model)
    check_text("--system", system)
    config, virtual = open_checkpoint(model).config, virtual_tokens(adapter_config(adapter))
    check_opening(tokenizer, system, config, config.max_position_embeddings - virtual)
    split = SplitModelForCausalLM.from_pretrained(model, trunk, adapter=adapter)
    options = ChatOptions(system, max_new_tokens, temperature, top_k, seed)
    try:
        talk(split, tokenizer, options)
    finally:
        split.remote_trunk.close()


def talk(model: object, tokenizer: object, options: ChatOptions) -> None:
    """Opens a conversation on the terminal, or on whatever is piped in."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    chat(model, tokenizer, options)
