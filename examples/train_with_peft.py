"""The U by hand: a bottom and a top here, a trunk over there, and PEFT on all three."""

import argparse

from transformers import AutoTokenizer

from client_service import PEFTSplitLearningTrainer, TrainingClient
from client_service.data import batches, read_texts, token_blocks
from client_service.peft_trainer import default_lora_config
from shared.bundled import model_dir, private_train_file
from shared.models import GPT2BottomModel, GPT2TopModel

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--trunk", default="localhost:50052")
options.add_argument("--model", default=str(model_dir()), help="a GPT-2")
options.add_argument("--data", default=str(private_train_file()))
options.add_argument("--steps", type=int, default=50)
options.add_argument("--out", default="runs/train_with_peft")
args = options.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
blocks = token_blocks(read_texts(args.data), tokenizer, seq_len=128)

lora = default_lora_config()
with TrainingClient(args.trunk, lora) as trunk_client:
    served = trunk_client.session.info
    bottom = GPT2BottomModel.from_pretrained(args.model, end_layer=served.start_layer)
    top = GPT2TopModel.from_pretrained(args.model, start_layer=served.end_layer)
    trainer = PEFTSplitLearningTrainer(bottom, top, trunk_client, lora, learning_rate=1e-3)
    for step, input_ids in zip(
        range(1, args.steps + 1), batches(blocks, batch_size=8, seed=0), strict=False
    ):
        metrics = trainer.train_step(input_ids, labels=input_ids)
        print(f"step {step}: loss {metrics['loss']:.4f}")
    trainer.save_lora_weights(args.out)  # bottom_lora/, trunk_lora/, top_lora/

print(f"adapter: {args.out}")
