"""Fine-tune a DeepSeekMoE with LoRA on its routed and shared experts, with Trainer.

    make demo                             # leaves a small model in runs/demo/model
    python examples/finetune_lora.py      # trains an adapter for it

Any checkpoint folder or hub id of the family works: --model deepseek-ai/DeepSeek-V2-Lite, for example. The data here
are pages of Python's language reference; every eighth page is held out.
"""

from pathlib import Path
from typing import Annotated

import typer
from demo_data import TokenBlocks, reference_blocks, sample_blocks
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import modeling_deepseekmoe
from modeling_deepseekmoe import expert_lora_config, load_tokenizer
from modeling_deepseekmoe.analysis.evaluation import perplexity


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = "runs/demo/model",
    output: Annotated[Path, typer.Option(help="Folder of the adapter.")] = Path("runs/lora"),
    rank: Annotated[int, typer.Option(help="Rank of every expert's adapter.")] = 16,
    dropout: Annotated[float, typer.Option(help="Dropout in front of the adapters.")] = 0.05,
    experts: Annotated[Path | None, typer.Option(help="An esft.json: adapt only these experts.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, with a linear decay.")] = 1e-3,
    block_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    held_out: Annotated[int, typer.Option(help="Held-out sequences to measure on.")] = 32,
) -> None:
    """Train, save the adapter and say what it gained."""
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    train_blocks, test_blocks = reference_blocks(tokenizer, block_size)
    batches = sample_blocks(test_blocks, held_out).split(8)
    before = perplexity(base, batches)

    config = expert_lora_config(
        base, r=rank, lora_dropout=dropout, target_modules=("shared_experts",), experts=experts
    )
    adapted = get_peft_model(base, config)
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=learning_rate,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    Trainer(adapted, arguments, train_dataset=TokenBlocks(train_blocks)).train()
    adapted.save_pretrained(output / "adapter")
    print(f"held-out perplexity {before:.3f} -> {perplexity(adapted, batches):.3f}")
    print(f"merge it with: deepseekmoe merge {model} {output / 'adapter'} {output / 'merged'}")


if __name__ == "__main__":
    typer.run(main)
