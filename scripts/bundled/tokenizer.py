"""The byte-level BPE tokenizer of the bundled model, trained on the pre-training texts only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from scripts.bundled.grammar import load

EOS = "<|endoftext|>"
PLAIN_WEIGHT = 20


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the tokenizer.

    The hand-written passages are repeated, since a vocabulary made of the generated texts
    alone would hold their few words and split all other English into letters.

    Args:
        texts: The generated texts; the private notes must not be among them.
        vocab_size: Number of tokens, with the end-of-text token.

    Returns:
        The trained tokenizer; any bytes can be encoded with it.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *load("plain.txt")["plain"] * PLAIN_WEIGHT], trainer)
    return tokenizer


def eos_id(tokenizer: Tokenizer) -> int:
    """Find the id of the end-of-text token.

    Args:
        tokenizer: A tokenizer made by ``train``.

    Returns:
        The id.

    Raises:
        ValueError: If the tokenizer has no such token.
    """
    found: int | None = tokenizer.token_to_id(EOS)
    if found is None:
        raise ValueError(f"the tokenizer has no {EOS}")
    return found


def save(tokenizer: Tokenizer, folder: Path, positions: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Args:
        tokenizer: The trained tokenizer.
        folder: Where the files go.
        positions: The longest sequence the model takes.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
