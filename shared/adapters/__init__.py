"""Hugging Face PEFT adapters on the parts of a split model, cut and joined by name."""
