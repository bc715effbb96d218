"""``trunkline train``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from client_service.chat import ChatOptions
from client_service.cli import app
from client_service.cli.chat import talk
from client_service.cli.options import (
    DEFAULT_TRUNK,
    AdapterOption,
    BatchSizeOption,
    ModelOption,
    PeftConfigOption,
    PeftOption,
    PeftPartsOption,
    QuantizeOption,
    SeedOption,
    SeqLenOption,
    ThreadsOption,
    TrunkOption,
    load_tokenizer,
    model_or_bundled,
    prepare,
    read_peft_config,
    show,
)
from client_service.data import batches, read_texts, token_blocks
from client_service.split_model import SplitModelForCausalLM
from client_service.training import StepMetrics, TrainingPlan, train
from shared.bundled import private_train_file

_MIB = 1024**2


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="Folder for metrics.jsonl and adapter/.")],
    model: ModelOption = "",
    trunk: TrunkOption = DEFAULT_TRUNK,
    data: Annotated[
        Path | None,
        typer.Option(help=".txt, .jsonl or a folder of them; default: the bundled notes."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 100,
    batch_size: BatchSizeOption = 8,
    seq_len: SeqLenOption = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: SeedOption = 0,
    optimizer: Annotated[
        Literal["adamw", "sgd", "adafactor"], typer.Option(help="Of all parts, the trunk's too.")
    ] = "adamw",
    peft: PeftOption = "lora",
    peft_config: PeftConfigOption = None,
    peft_parts: PeftPartsOption = "all",
    trunk_peft: Annotated[
        Literal["same", "none"], typer.Option(help="Adapter of the trunk's blocks.")
    ] = "same",
    adapter: AdapterOption = None,
    dropout: Annotated[
        float, typer.Option(help="Of the model's own layers and of the adapter.", min=0, max=0.99)
    ] = 0.0,
    grad_clip: Annotated[float, typer.Option(help="Largest global gradient norm; 0: off.")] = 1.0,
    grad_accum: Annotated[int, typer.Option(help="Batches of one step.", min=1)] = 1,
    lr_schedule: Annotated[
        Literal["constant", "constant_with_warmup", "linear", "cosine"],
        typer.Option(help="How the learning rate moves."),
    ] = "constant",
    warmup_steps: Annotated[int, typer.Option(help="Of the schedule.", min=0)] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with the model when it is trained.")
    ] = False,
    quantize: QuantizeOption = "",
    threads: ThreadsOption = 0,
) -> None:
    """Fine-tune through the split; write metrics and ONE adapter of the whole model."""
    prepare(threads)
    model = model_or_bundled(model)
    texts = read_texts(data or private_train_file())
    tokenizer = load_tokenizer(model)
    blocks = token_blocks(texts, tokenizer, seq_len)
    config = None
    if adapter is None:
        config = read_peft_config(peft, peft_config, model, dropout, steps)
    split = SplitModelForCausalLM.from_pretrained(
        model,
        trunk,
        peft_config=config,
        trunk_peft_config="same" if trunk_peft == "same" else None,
        peft_parts=peft_parts,
        adapter=adapter,
        seed=seed,
        dropout=dropout,
        quantize=quantize,
    )
    plan = TrainingPlan(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        grad_clip=grad_clip,
        grad_accum=grad_accum,
        schedule=lr_schedule,
        warmup_steps=warmup_steps,
        seed=seed,
    )
    run = train(split, batches(blocks, batch_size, seed), plan)
    last = record(run, steps, out)
    split.save_pretrained(out / "adapter")
    show({"adapter": str(out / "adapter"), **last.as_dict()})
    if chat:
        talk(split, tokenizer, ChatOptions(seed=seed))
    split.remote_trunk.close()


def record(run: Iterator[StepMetrics], steps: int, out: Path) -> StepMetrics:
    """Writes ``metrics.jsonl`` and shows progress; returns the last step's metrics."""
    out.mkdir(parents=True, exist_ok=True)
    last: StepMetrics | None = None
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as file, _progress() as progress:
        task = progress.add_task("train", total=steps, facts="")
        for last in run:
            file.write(json.dumps(last.as_dict()) + "\n")
            file.flush()
            progress.update(task, advance=1, facts=_facts(last))
    assert last is not None
    return last


def _progress() -> Progress:
    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
    ]
    return Progress(*columns, console=Console(stderr=True))


def _facts(metrics: StepMetrics) -> str:
    return (
        f"loss {metrics.loss:.3f}  {metrics.tokens / metrics.seconds:,.0f} tokens/s  "
        f"up {metrics.bytes_sent / _MIB:.1f} MiB  down {metrics.bytes_received / _MIB:.1f} MiB"
    )
