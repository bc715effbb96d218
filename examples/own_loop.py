"""An ordinary PyTorch loop on a split model: not a line of it knows about the trunk."""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from client_service import SplitModelForCausalLM
from client_service.data import batches, read_texts, token_blocks
from shared.bundled import model_dir, private_train_file

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--trunk", default="localhost:50052")
options.add_argument("--model", default=str(model_dir()))
options.add_argument("--data", default=str(private_train_file()))
options.add_argument("--steps", type=int, default=50)
options.add_argument("--out", default="runs/own_loop")
args = options.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
blocks = token_blocks(read_texts(args.data), tokenizer, seq_len=128)

model = SplitModelForCausalLM.from_pretrained(
    args.model,
    args.trunk,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
)
trainable = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=1e-3)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)

model.train()
for step, input_ids in zip(
    range(1, args.steps + 1), batches(blocks, batch_size=8, seed=0), strict=False
):
    loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    loss.backward()  # through the trunk and back
    norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)  # of all blocks, the trunk's too
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, gradient norm {norm.item():.3f}")

model.save_pretrained(f"{args.out}/adapter")  # one adapter of the whole model
model.remote_trunk.close()
print(f"adapter: {args.out}/adapter")
