"""``transformers.Trainer`` on a split model: no callback, no subclass."""

import argparse

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from client_service import SplitModelForCausalLM
from client_service.data import read_texts, token_blocks
from shared.bundled import model_dir, private_train_file

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--trunk", default="localhost:50052")
options.add_argument("--model", default=str(model_dir()))
options.add_argument("--data", default=str(private_train_file()))
options.add_argument("--steps", type=int, default=50)
options.add_argument("--out", default="runs/hf_trainer")
options.add_argument("--resume", help="a checkpoint folder in --out, to go on from")
args = options.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
blocks = token_blocks(read_texts(args.data), tokenizer, seq_len=128).tolist()
dataset = Dataset.from_dict({"input_ids": blocks, "labels": blocks})

split = SplitModelForCausalLM.from_pretrained(args.model, args.trunk)
lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
model = get_peft_model(split, lora)  # on all blocks, the trunk's too
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=25,  # every checkpoint is a standard adapter and its optimizer
        report_to=[],
    ),
    train_dataset=dataset,
    data_collator=default_data_collator,
)
trainer.train(resume_from_checkpoint=args.resume)

trainer.save_model(f"{args.out}/adapter")  # one adapter of the whole model
split.remote_trunk.close()
print(f"adapter: {args.out}/adapter")
