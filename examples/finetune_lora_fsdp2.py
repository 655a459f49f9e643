"""Fine-tune a DeepSeekMoE with LoRA on its experts, on one process or many that hold parts of the frozen model.

    make demo                                                    # leaves a small model in runs/demo/model
    python examples/finetune_lora_fsdp2.py                       # one process
    accelerate launch --config_file configuration/accelerate/fsdp2_lora.yaml --num_processes 4 \\
        examples/finetune_lora_fsdp2.py --model deepseek-ai/DeepSeek-V2-Lite

The files of configuration/accelerate work but for fsdp2_cpu_offload.yaml, and so do --tp-size and --ep-size. The data
here are pages of Python's language reference.
"""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from demo_data import TokenBlocks, reference_blocks
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator, set_seed

import modeling_deepseekmoe
from modeling_deepseekmoe import ShardedTrainer, expert_lora_config, load_tokenizer, sharding_of_launch


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = "runs/demo/model",
    output: Annotated[Path, typer.Option(help="Folder of the checkpoints and the adapter.")] = Path("runs/lora-fsdp2"),
    rank: Annotated[int, typer.Option(help="Rank of every adapter.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step, all processes together.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, with a linear decay.")] = 1e-3,
    block_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    tp_size: Annotated[int, typer.Option(help="Processes that share a batch and every layer.")] = 1,
    ep_size: Annotated[int, typer.Option(help="Processes that hold different experts.")] = 1,
) -> None:
    """Train and save the adapter."""
    sharding = sharding_of_launch(tp_size=tp_size if tp_size > 1 else None, ep_size=ep_size)
    batches = int(os.environ.get("WORLD_SIZE", "1")) // (1 if sharding is None else sharding.tp_size)
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=max(1, batch_size // batches),
        learning_rate=learning_rate,
        bf16=bf16,
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=save_steps,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # processes without a GPU do not find each other otherwise
    )
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(model)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, distributed_config=sharding)
    set_seed(arguments.seed)  # the adapters begin with the same values in every process
    config = expert_lora_config(base, r=rank, target_modules=("self_attn", "shared_experts"))
    adapted = get_peft_model(base, config)
    trainer = ShardedTrainer(
        adapted,
        arguments,
        train_dataset=TokenBlocks(reference_blocks(tokenizer, block_size)[0]),
        processing_class=tokenizer,
        data_collator=default_data_collator,  # the blocks have one length
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output / "adapter"))
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} on {arguments.world_size} processes")
        print(f"merge it with: deepseekmoe merge {model} {output / 'adapter'} {output / 'merged'}")


if __name__ == "__main__":
    typer.run(main)
