"""``trl.SFTTrainer`` on a split model, with packing: no callback, no subclass."""

import argparse

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from client_service import SplitModelForCausalLM
from client_service.data import read_texts
from shared.bundled import model_dir, private_train_file

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--trunk", default="localhost:50052")
options.add_argument("--model", default=str(model_dir()))
options.add_argument("--data", default=str(private_train_file()))
options.add_argument("--steps", type=int, default=50)
options.add_argument("--out", default="runs/trl_sft")
options.add_argument("--resume", help="a checkpoint folder in --out, to go on from")
args = options.parse_args()

lines = [line for text in read_texts(args.data) for line in text.splitlines() if line.strip()]

model = SplitModelForCausalLM.from_pretrained(
    args.model,
    args.trunk,
    # Or to the trainer; here it is checked before the data is prepared.
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        max_length=128,
        packing=True,  # texts do not see each other: both sides mask by position ids
        bf16=False,  # trl's default would round on both sides
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=25,
        report_to=[],
    ),
    train_dataset=Dataset.from_dict({"text": lines}),
    processing_class=AutoTokenizer.from_pretrained(args.model),
)
trainer.train(resume_from_checkpoint=args.resume)

trainer.save_model(f"{args.out}/adapter")  # one adapter of the whole model
model.remote_trunk.close()
print(f"adapter: {args.out}/adapter")
