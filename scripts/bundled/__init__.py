"""Scripts that make the bundled texts, tokenizer and model."""
