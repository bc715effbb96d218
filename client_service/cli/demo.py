"""``trunkline demo``: the main job on what the project brings, from nothing to a report."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from client_service.cli import app
from client_service.cli.model import labelled
from client_service.cli.options import (
    SeedOption,
    StepsOption,
    ThreadsOption,
    given_path,
    load_tokenizer,
    prepare,
    read_peft_config,
)
from client_service.cli.run_file import put_file
from client_service.cli.train import record, write_adapter
from client_service.credentials import TLS_VARIABLE, TOKEN_VARIABLE
from client_service.data import batches, read_texts, token_blocks
from client_service.local_trunk import local_trunk
from client_service.split_model import SplitModelForCausalLM
from client_service.training import TrainingPlan, mean_loss, traffic, train
from client_service.verify import VerifyPlan, verify
from shared.bundled import model_dir, private_heldout_file, private_train_file
from shared.new_folder import check_writable

SPLIT = "2:10"
SEQ_LEN, BATCH_SIZE = 128, 8
PROMPT = "<|endoftext|>WARD ROUND"


@app.command("demo")
def demo_command(
    out: Annotated[
        Path, typer.Option(help="Folder for the report.", parser=given_path, metavar="PATH")
    ] = Path("runs/demo"),
    steps: StepsOption = 300,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
) -> None:
    """Start a trunk, fine-tune the bundled model on the bundled notes, and report."""
    prepare(threads)
    check_writable(out)
    for variable in (TLS_VARIABLE, TOKEN_VARIABLE):
        os.environ.pop(variable, None)  # for another trunk than the one started here
    model = str(model_dir())
    typer.echo(f"Starting a trunk daemon for blocks {SPLIT} of the bundled GPT-2 …")
    with local_trunk(model, SPLIT) as address:
        report = _fine_tune(model, address, out, steps, seed)
        typer.echo("Training split and whole side by side …")
        report["split_versus_whole"] = _versus_whole(model, address, seed)
    path = out / "report.json"
    put_file(path, json.dumps(report, indent=2).encode())
    _print(report, path)


def _fine_tune(model: str, address: str, out: Path, steps: int, seed: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    held_out = token_blocks(read_texts(private_heldout_file()), tokenizer, SEQ_LEN)
    blocks = token_blocks(read_texts(private_train_file()), tokenizer, SEQ_LEN)
    config = read_peft_config("lora", None, model, 0.0, steps)
    split = SplitModelForCausalLM.from_pretrained(
        model, address, split=SPLIT, peft_config=config, seed=seed, dropout=0.0
    )
    before = mean_loss(split, held_out, BATCH_SIZE)
    sample_before = _sample(split, tokenizer, seed)
    sent, received = traffic(split)
    plan = TrainingPlan(
        steps=steps, batch_size=BATCH_SIZE, lr=3e-3, schedule="cosine", warmup_steps=10, seed=seed
    )
    last = record(train(split, batches(blocks, BATCH_SIZE, seed), plan), steps, out)
    now_sent, now_received = traffic(split)
    after = mean_loss(split, held_out, BATCH_SIZE)
    report = {
        "trunk": address,
        "split": SPLIT,
        "steps": steps,
        "final_train_loss": last.loss,
        "held_out_perplexity_before": math.exp(before),
        "held_out_perplexity_after": math.exp(after),
        "uniform_guess_perplexity": len(tokenizer),
        "sample_before": sample_before,
        "sample_after": _sample(split, tokenizer, seed),
        "training_bytes_sent": now_sent - sent,
        "training_bytes_received": now_received - received,
        "trained_tokens": steps * BATCH_SIZE * SEQ_LEN,
        "adapter": str(out / "adapter"),
    }
    write_adapter(split, out)
    split.remote_trunk.close()
    return report


def _sample(model: Any, tokenizer: Any, seed: int) -> str:
    torch.manual_seed(seed)
    model.eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _versus_whole(model: str, address: str, seed: int) -> dict[str, float]:
    blocks = token_blocks(read_texts(private_train_file()), load_tokenizer(model), 64)
    config = read_peft_config("lora", None, model, 0.0, 10)
    ordered = labelled(batches(blocks, 4, seed))
    return verify(model, address, config, ordered, VerifyPlan(steps=10), seed).as_dict()


def _print(report: dict[str, Any], path: Path) -> None:
    before, after = report["held_out_perplexity_before"], report["held_out_perplexity_after"]
    tokens = report["trained_tokens"]
    sent, received = report["training_bytes_sent"], report["training_bytes_received"]
    found = report["split_versus_whole"]
    lines = [
        "",
        f"Held-out perplexity   {before:.1f} before, {after:.1f} after ({after / before:.4f} x)",
        "                      (the bundled model knows children's stories and is confidently "
        f"wrong on ward notes; a uniform guess has {report['uniform_guess_perplexity']})",
        f"Sample before         {report['sample_before']}",
        f"Sample after          {report['sample_after']}",
        f"Bytes while training  {sent:,} up, {received:,} down "
        f"({(sent + received) / tokens:.0f} per token)",
        f"Split versus whole    loss {found['max_abs_loss_diff']:.1e}, gradients "
        f"{found['max_abs_grad_diff']:.1e}, adapter {found['max_abs_adapter_diff']:.1e} "
        f"(largest differences over {found['steps']:.0f} steps)",
        f"Adapter               {report['adapter']} (a standard PEFT adapter of the whole model)",
        f"Report                {path}",
        "",
        "Token ids and labels were not sent. That is not privacy against the trunk's host: hidden",
        "states and gradients let it infer much of the text. See docs/privacy.md.",
    ]
    typer.echo("\n".join(lines))
