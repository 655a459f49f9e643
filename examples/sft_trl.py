"""Supervised fine-tuning with TRL's SFTTrainer and LoRA on the experts.

    make demo                             # leaves a small model in runs/demo/model
    python examples/sft_trl.py            # questions and answers about Python's own functions

The data are conversations made from the documentation of Python's built-in functions.
"""

import builtins
import inspect
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import modeling_deepseekmoe
from modeling_deepseekmoe import expert_lora_config, load_tokenizer


def conversations() -> list[dict[str, list[dict[str, str]]]]:
    """One question and its answer for everything built in that is documented."""
    rows = []
    for name in sorted(dir(builtins)):
        text = inspect.getdoc(getattr(builtins, name))
        if text and not name.startswith("_"):
            question = {"role": "user", "content": f"What is `{name}` in Python?"}
            rows.append({"messages": [question, {"role": "assistant", "content": text}]})
    return rows


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id; its tokenizer needs a chat template.")] = (
        "runs/demo/model"
    ),
    output: Annotated[Path, typer.Option(help="Folder of the adapter.")] = Path("runs/sft"),
    rank: Annotated[int, typer.Option(help="Rank of every expert's adapter.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, with a linear decay.")] = 1e-3,
    max_length: Annotated[int, typer.Option(help="Longest conversation in tokens.")] = 256,
) -> None:
    """Train and save the adapter."""
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    arguments = SFTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=learning_rate,
        max_length=max_length,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        base,
        arguments,
        train_dataset=Dataset.from_list(conversations()),
        processing_class=tokenizer,
        peft_config=expert_lora_config(base, r=rank, target_modules=("self_attn",)),
    )
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    print(f"merge it with: deepseekmoe merge {model} {output / 'adapter'} {output / 'merged'}")


if __name__ == "__main__":
    typer.run(main)
