"""Makes the bundled data and model: texts, then tokenizer, then weights.

Run from the repository root::

    python -m scripts.bundled.build
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch

from scripts.bundled import notes, stories
from scripts.bundled import tokenizer as bpe
from scripts.bundled.pretrain import Plan, new_model, pack, pretrain
from scripts.bundled.publish import publish

LOG = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2] / "shared" / "bundled"
VOCAB = 1536
TRAIN_SEED, HELD_OUT_SEED, NOTES_SEED = 1, 2, 3
TOKENIZER_CHARACTERS = 3_000_000
HELD_OUT_CHARACTERS = 30_000
CHARACTERS_PER_TOKEN = 4.0
STEPS = 3600


def write_lines(path: Path, texts: list[str]) -> None:
    """Write one text a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    LOG.info("%s: %d texts, %d bytes", path.name, len(texts), path.stat().st_size)


def make_notes(data: Path) -> None:
    """Write the private data set."""
    train, held_out = notes.data_set(NOTES_SEED)
    write_lines(data / "notes_train.txt", train)
    write_lines(data / "notes_heldout.txt", held_out)


def make_corpus(data: Path, tokens: int) -> tuple[list[str], list[str]]:
    """Write the held-out stories and return the training and the held-out texts."""
    held_out = stories.texts_of_size(HELD_OUT_SEED, HELD_OUT_CHARACTERS)
    write_lines(data / "stories_heldout.txt", held_out)
    size = int(tokens * CHARACTERS_PER_TOKEN)
    train = stories.texts_of_size(TRAIN_SEED, size, barred=frozenset(held_out))
    return train, held_out


def make_model(out: Path, plan: Plan) -> None:
    """Train the tokenizer and the model and write both."""
    texts, held_out = make_corpus(out / "data", plan.steps * plan.batch * plan.block)
    for_tokenizer = stories.texts_of_size(TRAIN_SEED, TOKENIZER_CHARACTERS)
    tokenizer = bpe.train(for_tokenizer, VOCAB)
    bpe.save(tokenizer, out / "model", plan.block)
    blocks = pack(texts, tokenizer, plan.block)
    LOG.info("%d texts, %d blocks of %d tokens", len(texts), len(blocks), plan.block)
    model = new_model(tokenizer.get_vocab_size(), bpe.eos_id(tokenizer), plan.block)
    LOG.info("%d parameters", model.num_parameters())
    held_out_blocks = pack(held_out, tokenizer, plan.block)
    pretrain(model, blocks, held_out_blocks, plan, lambda m: publish(m, out / "model"))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--data-only", action="store_true", help="write the notes and stop")
    return parser.parse_args()


def main() -> None:
    """Make everything."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parse_arguments()
    started = time.monotonic()
    make_notes(arguments.out / "data")
    if not arguments.data_only:
        plan = Plan(steps=arguments.steps, threads=arguments.threads)
        torch.set_num_threads(plan.threads)
        torch.manual_seed(plan.seed)
        make_model(arguments.out, plan)
    LOG.info("done in %.0f s", time.monotonic() - started)


if __name__ == "__main__":
    main()
