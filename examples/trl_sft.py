"""Training on a model's own completions with TRL's SFTTrainer, at the published settings.

    pip install trl
    spd generate -m MODEL -t gsm8k --subspace subspace --out completions.jsonl
    python examples/trl_sft.py MODEL completions.jsonl adapter

The loss is the paper's: next-token, on prompt and completion alike (completion_only_loss=False). The sampled token ids
are taken as they are, since text does not always lead back to them; the end-of-sequence token is trained on where the
model produced it.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from spd.generation import read_generations

MAX_LENGTH = 256


def train(model: str, completions: str, out: str, **settings: Any) -> SFTTrainer:
    """Train a LoRA adapter and save it to `out`; `settings` replace those of `SFTConfig` below."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        {"input_ids": (tokenizer(each.prompt)["input_ids"] + each.tokens)[:MAX_LENGTH]}
        for each in read_generations(completions)
    ]
    published: dict[str, Any] = {
        "completion_only_loss": False,
        "max_length": MAX_LENGTH,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # a share of the steps: half an epoch of five
        "max_grad_norm": 1.0,
        "seed": 42,
        "report_to": "none",
    }
    lora = LoraConfig(
        r=8,
        lora_alpha=8,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=out, **(published | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="LoRA on a model's own completions with TRL.")
    for name in ("model", "completions", "out"):
        parser.add_argument(name)
    train(**vars(parser.parse_args()))
