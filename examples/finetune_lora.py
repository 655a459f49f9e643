"""Fine-tune a DeepSeekMoE with Trainer and LoRA on its routed and shared experts.

    make demo                             # leaves a small model in runs/demo/model
    python examples/finetune_lora.py      # trains an adapter for it

Any checkpoint folder or hub id of the family works, for example --model deepseek-ai/DeepSeek-V2-Lite. The data here
are pages of Python's language reference. Every eighth page is held out.
"""

from dataclasses import dataclass, field
from pathlib import Path

from demo_data import TokenBlocks, reference_blocks, sample_blocks
from peft import get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

import modeling_deepseekmoe
from modeling_deepseekmoe import expert_lora_config, load_tokenizer
from modeling_deepseekmoe.analysis.evaluation import perplexity


@dataclass
class Settings:
    """Options of the example: what is adapted, and how it is trained."""

    model: str = field(default="runs/demo/model", metadata={"help": "Checkpoint folder or hub id."})
    output: Path = field(default=Path("runs/lora"), metadata={"help": "Folder of the adapter."})
    rank: int = field(default=16, metadata={"help": "Rank of every expert's adapter."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    experts: Path | None = field(default=None, metadata={"help": "An esft.json: adapt only these experts."})
    steps: int = field(default=20, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=0.001, metadata={"help": "Of AdamW, with a linear decay."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    held_out: int = field(default=32, metadata={"help": "Held-out sequences to measure on."})


def main(settings: Settings) -> None:
    """Train an adapter, save it, and say what it gained."""
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(settings.model)
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    train_blocks, test_blocks = reference_blocks(tokenizer, settings.block_size)
    batches = sample_blocks(test_blocks, settings.held_out).split(8)
    before = perplexity(base, batches)

    config = expert_lora_config(
        base,
        r=settings.rank,
        lora_dropout=settings.dropout,
        target_modules=("shared_experts",),
        experts=settings.experts,
    )
    adapted = get_peft_model(base, config)
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(settings.output / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=4,
        learning_rate=settings.learning_rate,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    Trainer(adapted, arguments, train_dataset=TokenBlocks(train_blocks)).train()
    adapted.save_pretrained(settings.output / "adapter")
    print(f"held-out perplexity {before:.3f} -> {perplexity(adapted, batches):.3f}")
    print(
        f"merge it with: deepseekmoe merge {settings.model} {settings.output / 'adapter'} {settings.output / 'merged'}"
    )


if __name__ == "__main__":
    main(HfArgumentParser(Settings).parse_args_into_dataclasses()[0])
