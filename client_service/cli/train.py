"""``trunkline train``."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import torch
import typer
from peft import PeftConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from client_service.adapter_base import note_base
from client_service.addresses import wait_for_trunk
from client_service.atomic_folder import remove_leftovers, replaced_folder
from client_service.chat import ChatOptions
from client_service.checkpoint import Checkpoint, Checkpoints
from client_service.checkpoint_files import has_checkpoints
from client_service.cli import app
from client_service.cli.chat import talk
from client_service.cli.mistakes import in_one_line
from client_service.cli.options import (
    DEFAULT_TRUNK,
    MOST,
    SEEDS,
    AdapterOption,
    AdapterWireFormatOption,
    BatchSizeOption,
    GradientWireFormatOption,
    ModelOption,
    OneDnnOption,
    PeftConfigOption,
    PeftOption,
    PeftPartsOption,
    QuantizeOption,
    SeqLenOption,
    StepsOption,
    ThreadsOption,
    TrunkOption,
    WireDriftOption,
    WireFormatOption,
    adapter_config,
    given_path,
    load_blocks,
    model_or_bundled,
    prepare,
    read_peft_config,
    show,
)
from client_service.cli.run_file import (
    METRICS_FILE,
    RUN_FILE,
    RunSettings,
    check_same_data,
    check_same_secret,
    cut_metrics,
    resumed_settings,
    write_run,
)
from client_service.data import batches
from client_service.fresh_ends import can_redraw
from client_service.placement import TrunkPeft, wanted_parts
from client_service.split_model import SplitModelForCausalLM
from client_service.training import StepMetrics, TrainingPlan, train
from shared.bundled import private_train_file
from shared.errors import AdapterError, CheckpointError, InvalidInputError
from shared.freed_memory import keep_freed_memory, return_freed_memory
from shared.models.tensor_files import first_line
from shared.new_folder import check_writable, is_of_the_disk

_MIB = 1024**2
_LARGEST = torch.finfo(torch.float32).max


@app.command("train")
def train_command(
    context: typer.Context,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for run.json, metrics.jsonl, checkpoints/ and adapter/.",
            parser=given_path,
            metavar="PATH",
        ),
    ],
    model: ModelOption = "",
    trunk: TrunkOption = DEFAULT_TRUNK,
    data: Annotated[
        Path | None,
        typer.Option(
            help=".txt, .jsonl or a folder of them; default: the bundled notes.",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    steps: StepsOption = 100,
    batch_size: BatchSizeOption = 8,
    seq_len: SeqLenOption = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.", min=0, max=_LARGEST)] = 1e-3,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of everything that is drawn; without one, the ends' fresh adapter is drawn from "
            "the system's randomness.",
            min=0,
            max=SEEDS - 1,
        ),
    ] = None,
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
    grad_clip: Annotated[
        float, typer.Option(help="Largest global gradient norm; 0: off.", min=0)
    ] = 1.0,
    grad_accum: Annotated[int, typer.Option(help="Batches of one step.", min=1, max=MOST)] = 1,
    lr_schedule: Annotated[
        Literal["constant", "constant_with_warmup", "linear", "cosine"],
        typer.Option(help="How the learning rate moves."),
    ] = "constant",
    warmup_steps: Annotated[int, typer.Option(help="Of the schedule.", min=0, max=MOST)] = 0,
    checkpoint_every: Annotated[
        int,
        typer.Option(
            help="Steps between two checkpoints in OUT/checkpoints; 0: none.", min=0, max=MOST
        ),
    ] = 0,
    keep_last: Annotated[int, typer.Option(help="Checkpoints that stay.", min=1, max=MOST)] = 2,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in OUT from its newest checkpoint, with the options it had.",
        ),
    ] = False,
    reconnect_timeout: Annotated[
        float, typer.Option(help="Seconds: how long to wait for a trunk that is gone.", min=0)
    ] = 600.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with the model when it is trained.")
    ] = False,
    quantize: QuantizeOption = "",
    micro_batches: Annotated[
        int,
        typer.Option(
            help="Pieces of a batch on their way through the split at once.", min=1, max=MOST
        ),
    ] = 1,
    wire_format: WireFormatOption = "float32",
    gradient_wire_format: GradientWireFormatOption = None,
    adapter_wire_format: AdapterWireFormatOption = "float32",
    max_wire_drift: WireDriftOption = None,
    fused_loss: Annotated[
        bool, typer.Option(help="Make the loss without the logits: faster, other last digits.")
    ] = False,
    onednn: OneDnnOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Fine-tune through the split; write metrics and ONE adapter of the whole model."""
    given = dict(context.params) | {"data": data, "peft_config": peft_config, "adapter": adapter}
    settings = RunSettings(**{name: given[name] for name in RunSettings.__annotations__})
    check_writable(out)
    if resume:
        settings = resumed_settings(out, settings, _named(context))
        _check_again(context, settings, out / RUN_FILE)
    elif has_checkpoints(out / "checkpoints"):
        raise CheckpointError(
            f"{out}: has checkpoints of a run already; give --resume to go on with it, or another "
            f"--out"
        )
    prepare(settings.threads)
    keep_freed_memory()
    _train(out, settings, resume)


def _named(context: typer.Context) -> list[str]:
    """Which options of a run were written on the command line."""
    sources = ((n, context.get_parameter_source(n)) for n in RunSettings.__annotations__)
    return [n for n, source in sources if source is not None and source.name == "COMMANDLINE"]


def _check_again(context: typer.Context, settings: RunSettings, path: Path) -> None:
    """Asks of what a file says what is asked of the command line."""
    names = RunSettings.__annotations__
    for option in (option for option in context.command.params if option.name in names):
        try:
            option.process_value(context, getattr(settings, option.name))
        except (typer.TyperException, InvalidInputError) as error:
            raise CheckpointError(f"{path}: {in_one_line(error)}") from error


def _train(out: Path, settings: RunSettings, resume: bool) -> None:
    model = model_or_bundled(settings.model)
    config = _adapter(model, settings)
    data_file = settings.data or private_train_file()
    tokenizer, blocks = load_blocks(model, data_file, settings.seq_len, config)
    if resume:
        check_same_data(out, blocks)
        check_same_secret(out, settings)
        # Whatever ended the run may have ended its trunk too.
        wait_for_trunk(settings.trunk, settings.reconnect_timeout)
    split = _open(model, settings, None if settings.adapter else config)
    return_freed_memory()  # what loading took and no step will
    checkpoints = Checkpoints(out / "checkpoints", settings.checkpoint_every, settings.keep_last)
    start = checkpoints.newest(split) if resume else None
    if not resume:
        write_run(out, settings.anywhere(), blocks)
    plan = TrainingPlan(
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        optimizer=settings.optimizer,
        grad_clip=settings.grad_clip,
        grad_accum=settings.grad_accum,
        micro_batches=min(settings.micro_batches, settings.batch_size),
        schedule=settings.lr_schedule,
        warmup_steps=settings.warmup_steps,
        seed=settings.seed or 0,
    )
    taken = start.batches_taken if start else 0
    data = batches(blocks, settings.batch_size, plan.seed, taken)
    restore = start.restore if start else None
    run = train(split, data, plan, restore, checkpoints.save_if_due)
    facts = _finish(run, settings.steps, out, start)
    write_adapter(split, out)
    show({"adapter": str(out / "adapter"), **facts})
    if settings.chat:
        talk(split, tokenizer, ChatOptions(seed=plan.seed))
    split.remote_trunk.close()


def _adapter(model: str, settings: RunSettings) -> PeftConfig | None:
    """The configuration of the adapter that is trained, fresh or from ``--adapter``."""
    if settings.adapter is not None:
        if settings.peft_config is not None:
            raise AdapterError("--peft-config with --adapter, which has its own: give either")
        return adapter_config(settings.adapter)
    config = read_peft_config(
        settings.peft, settings.peft_config, model, settings.dropout, settings.steps
    )
    wanted_parts(config, _trunk_peft(settings), settings.peft_parts)
    return config


def _trunk_peft(settings: RunSettings) -> TrunkPeft:
    return "same" if settings.trunk_peft == "same" else None


def _open(model: str, settings: RunSettings, config: PeftConfig | None) -> Any:
    return SplitModelForCausalLM.from_pretrained(
        model,
        settings.trunk,
        peft_config=config,
        trunk_peft_config=_trunk_peft(settings),
        peft_parts=settings.peft_parts,
        adapter=settings.adapter,
        seed=settings.seed or 0,
        # Without a seed that repeats it, what the ends begin with is nobody's to find out.
        secret_ends=config is not None and settings.seed is None and can_redraw(config),
        dropout=settings.dropout,
        quantize=settings.quantize,
        fused_loss=settings.fused_loss,
        onednn=settings.onednn,
        wire_format=settings.wire_format,
        gradient_wire_format=settings.gradient_wire_format,
        adapter_wire_format=settings.adapter_wire_format,
        max_wire_drift=settings.max_wire_drift,
        reconnect_timeout_s=settings.reconnect_timeout,
    )


def _finish(
    run: Iterator[StepMetrics], steps: int, out: Path, start: Checkpoint | None
) -> dict[str, float]:
    """Does the steps that are left; returns the last one's metrics."""
    if start is None:
        return record(run, steps, out).as_dict()
    if start.step < steps:
        typer.echo(f"Going on after step {start.step} of {steps}.", err=True)
        return record(run, steps, out, start.step).as_dict()
    collections.deque(run, maxlen=0)  # which puts the checkpoint's weights in place
    cut_metrics(out, steps)
    typer.echo(f"This run is complete: all {steps} steps are done.", err=True)
    return {"step": start.step}


def write_adapter(split: Any, out: Path) -> None:
    """Writes ``OUT/adapter``, in the place of one that was there.

    Raises:
        CheckpointError: If the disk refuses; one that was there is as it was.
    """
    try:
        remove_leftovers(out)
        with replaced_folder(out / "adapter") as folder:
            split.save_pretrained(folder)
            note_base(folder, split.remote_trunk.session)
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        raise CheckpointError(
            f"{out / 'adapter'}: was not written ({first_line(error)})"
        ) from error


def record(run: Iterator[StepMetrics], steps: int, out: Path, done: int = 0) -> StepMetrics:
    """Writes ``metrics.jsonl`` and shows progress; returns the last step's metrics.

    Args:
        run: Yields what every step did.
        steps: Of the whole run.
        out: Folder of the run.
        done: Steps done before, whose lines stay.
    """
    cut_metrics(out, done)
    last: StepMetrics | None = None
    with (out / METRICS_FILE).open("a", encoding="utf-8") as file, _progress() as progress:
        task = progress.add_task("train", total=steps, completed=done, facts="")
        for last in run:
            _append(file, json.dumps(last.as_dict()))
            progress.update(task, advance=1, facts=_facts(last))
    assert last is not None
    return last


def _append(file: TextIO, line: str) -> None:
    try:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint of this step may follow, and counts on it
    except OSError as error:
        raise CheckpointError(
            f"{file.name}: {error.strerror}; make room and go on with --resume"
        ) from error


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
