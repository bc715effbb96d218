"""``trunkline split``, ``eval``, ``generate``, ``verify`` and ``info``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from google.protobuf.json_format import MessageToDict

from client_service.addresses import wait_for_trunk
from client_service.cli import app
from client_service.cli.options import (
    DEFAULT_TRUNK,
    MOST,
    AdapterOption,
    BatchSizeOption,
    ModelOption,
    NewTokensOption,
    OneDnnOption,
    PeftConfigOption,
    PeftOption,
    PeftPartsOption,
    QuantizeOption,
    SeedOption,
    SeqLenOption,
    StepsOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TrunkOption,
    adapter_config,
    check_text,
    given_path,
    load_blocks,
    load_tokenizer,
    model_or_bundled,
    prepare,
    read_peft_config,
    show,
)
from client_service.data import batches
from client_service.model_limits import check_prompt, check_vocabulary, virtual_tokens
from client_service.placement import wanted_parts
from client_service.split_model import SplitModelForCausalLM
from client_service.training import mean_loss
from client_service.verify import VerifyPlan, verify
from shared.bundled import private_heldout_file, private_train_file
from shared.errors import DataError, InvalidInputError
from shared.models import SplitRange, open_checkpoint
from shared.models.split_layout import write_split_layout


@app.command("split")
def split_command(
    out: Annotated[
        Path,
        typer.Option(
            help="New folder for bottom/, trunk/ and top/.", parser=given_path, metavar="PATH"
        ),
    ],
    model: ModelOption = "",
    split: Annotated[str, typer.Option(help="START:END of the trunk's blocks.")] = "2:10",
) -> None:
    """Write a model as three parts, each for its own side."""
    prepare(0)
    written = write_split_layout(model_or_bundled(model), SplitRange.parse(split), out)
    show({role: str(path) for role, path in written.items()})


@app.command("info")
def info_command(trunk: TrunkOption = DEFAULT_TRUNK) -> None:
    """Show what a trunk serves and accepts."""
    show(MessageToDict(wait_for_trunk(trunk), preserving_proto_field_name=True))


@app.command("eval")
def eval_command(
    model: ModelOption = "",
    trunk: TrunkOption = DEFAULT_TRUNK,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text to score; default: the bundled held-out notes.",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    adapter: AdapterOption = None,
    batch_size: BatchSizeOption = 8,
    seq_len: SeqLenOption = 128,
    quantize: QuantizeOption = "",
    onednn: OneDnnOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Print loss and perplexity on a text, through the split."""
    prepare(threads)
    model = model_or_bundled(model)
    _, blocks = load_blocks(model, data or private_heldout_file(), seq_len, adapter_config(adapter))
    split = SplitModelForCausalLM.from_pretrained(
        model, trunk, adapter=adapter, quantize=quantize, onednn=onednn
    )
    loss = mean_loss(split, blocks, batch_size)
    split.remote_trunk.close()
    show({"loss": loss, "perplexity": math.exp(loss), "tokens": blocks.numel()})


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")],
    model: ModelOption = "",
    trunk: TrunkOption = DEFAULT_TRUNK,
    adapter: AdapterOption = None,
    max_new_tokens: NewTokensOption = 64,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    num_beams: Annotated[int, typer.Option(help="Beam search.", min=1, max=MOST)] = 1,
    seed: SeedOption = 0,
    quantize: QuantizeOption = "",
    onednn: OneDnnOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Continue a text, through the split."""
    prepare(threads)
    model = model_or_bundled(model)
    tokenizer = load_tokenizer(model)
    text = _standard_input() if prompt == "-" else prompt
    check_text("--prompt", text)
    inputs = tokenizer(text, return_tensors="pt", verbose=False)
    config, virtual = open_checkpoint(model).config, virtual_tokens(adapter_config(adapter))
    check_prompt(inputs["input_ids"], config, max_new_tokens, virtual)
    check_vocabulary(inputs["input_ids"], tokenizer, config)
    if num_beams > config.vocab_size:
        raise InvalidInputError(f"--num-beams {num_beams}: accepted are 1 to {config.vocab_size}")
    split = SplitModelForCausalLM.from_pretrained(
        model, trunk, adapter=adapter, quantize=quantize, onednn=onednn
    )
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_beams": num_beams, "do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_k=top_k)
    output = split.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    split.remote_trunk.close()
    typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 text (byte {error.start})") from error


@app.command("verify")
def verify_command(
    model: ModelOption = "",
    trunk: TrunkOption = DEFAULT_TRUNK,
    steps: StepsOption = 20,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text to train on; default: the bundled notes.", parser=given_path, metavar="PATH"
        ),
    ] = None,
    peft: PeftOption = "lora",
    peft_config: PeftConfigOption = None,
    peft_parts: PeftPartsOption = "all",
    quantize: QuantizeOption = "",
    batch_size: BatchSizeOption = 4,
    seq_len: SeqLenOption = 64,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
) -> None:
    """Train split and whole from one adapter on one data order and print the differences.

    Exits 1 if a difference is more than float32 rounding explains.
    """
    prepare(threads)
    model = model_or_bundled(model)
    config = read_peft_config(peft, peft_config, model, 0.0, steps)
    wanted_parts(config, "same", peft_parts)
    _, blocks = load_blocks(model, data or private_train_file(), seq_len, config)
    ordered = labelled(batches(blocks, batch_size, seed))
    plan = VerifyPlan(steps=steps)
    found = verify(model, trunk, config, ordered, plan, seed, parts=peft_parts, quantize=quantize)
    show(found.as_dict())
    if not found.within_tolerance:
        raise typer.Exit(1)


def labelled(ordered: Iterator[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as keyword arguments of a causal-LM forward."""
    for input_ids in ordered:
        yield {"input_ids": input_ids, "labels": input_ids}
