"""Fine-tune a DeepSeekMoE on conversations, with TRL's SFTTrainer and LoRA on the experts.

    make demo                             # leaves a small model in runs/demo/model
    python examples/sft_trl.py            # questions and answers about Python's own functions

The conversations are made from the documentation of Python's built-in functions.
"""

import builtins
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import SFTConfig, SFTTrainer

import modeling_deepseekmoe
from modeling_deepseekmoe import expert_lora_config, load_tokenizer


def conversations() -> list[dict[str, list[dict[str, str]]]]:
    """Make one question and its answer for every built-in name that is documented."""
    rows = []
    for name in sorted(dir(builtins)):
        text = inspect.getdoc(getattr(builtins, name))
        if text and not name.startswith("_"):
            question = {"role": "user", "content": f"What is `{name}` in Python?"}
            rows.append({"messages": [question, {"role": "assistant", "content": text}]})
    return rows


@dataclass
class Settings:
    """Options of the example: what is trained, and how."""

    model: str = field(
        default="runs/demo/model",
        metadata={"help": "Checkpoint folder or hub id; its tokenizer needs a chat template."},
    )
    output: Path = field(default=Path("runs/sft"), metadata={"help": "Folder of the adapter."})
    rank: int = field(default=16, metadata={"help": "Rank of every expert's adapter."})
    steps: int = field(default=20, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=0.001, metadata={"help": "Of AdamW, with a linear decay."})
    max_length: int = field(default=256, metadata={"help": "Longest conversation in tokens."})


def main(settings: Settings) -> None:
    """Train an adapter and save it."""
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(settings.model)
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    arguments = SFTConfig(
        output_dir=str(settings.output),
        max_steps=settings.steps,
        per_device_train_batch_size=4,
        learning_rate=settings.learning_rate,
        max_length=settings.max_length,
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
        peft_config=expert_lora_config(base, r=settings.rank, target_modules=("self_attn",)),
    )
    trainer.train()
    trainer.save_model(str(settings.output / "adapter"))
    print(
        f"merge it with: deepseekmoe merge {settings.model} {settings.output / 'adapter'} {settings.output / 'merged'}"
    )


if __name__ == "__main__":
    main(HfArgumentParser(Settings).parse_args_into_dataclasses()[0])
