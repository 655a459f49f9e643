"""Train all parameters of a DeepSeekMoE, on one process or many, with checkpoints that resume on another number.

    make demo                                                    # leaves a small model in runs/demo/model
    python examples/train_fsdp2.py                               # one process
    accelerate launch --config_file configuration/accelerate/fsdp2_full.yaml --num_processes 8 \\
        examples/train_fsdp2.py --model deepseek-ai/DeepSeek-V2-Lite
    accelerate launch --config_file configuration/accelerate/fsdp2_full.yaml --num_processes 8 \\
        examples/train_fsdp2.py --ep-size 8                      # the experts lie on different processes

Every file of configuration/accelerate works. The data here are pages of Python's language reference.
"""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from demo_data import TokenBlocks, reference_blocks
from transformers import AutoModelForCausalLM, TrainingArguments, default_data_collator

import modeling_deepseekmoe
from modeling_deepseekmoe import (
    LoadBalancingCallback,
    RouterStatsCallback,
    ShardedTrainer,
    load_tokenizer,
    sharding_of_launch,
)


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = "runs/demo/model",
    output: Annotated[Path, typer.Option(help="Folder of the checkpoints and the model.")] = Path("runs/train"),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step, all processes together.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Micro-batches that a process makes of its part.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, with a linear decay.")] = 1e-4,
    block_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    tp_size: Annotated[int, typer.Option(help="Processes that share a batch and every layer.")] = 1,
    ep_size: Annotated[int, typer.Option(help="Processes that hold different experts.")] = 1,
) -> None:
    """Train, with checkpoints, and save the model under the official names."""
    sharding = sharding_of_launch(tp_size=tp_size if tp_size > 1 else None, ep_size=ep_size)
    batches = int(os.environ.get("WORLD_SIZE", "1")) // (1 if sharding is None else sharding.tp_size)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=max(1, batch_size // batches // accumulate),
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=save_steps,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # processes without a GPU do not find each other otherwise
    )
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(model)
    # In float32, which the optimizer needs; bf16=True computes in bfloat16.
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, distributed_config=sharding)
    biased = trained.config.topk_method == "noaux_tc"
    trainer = ShardedTrainer(
        trained,
        arguments,
        train_dataset=TokenBlocks(reference_blocks(tokenizer, block_size)[0]),
        processing_class=tokenizer,
        data_collator=default_data_collator,  # the blocks have one length
        callbacks=[LoadBalancingCallback() if biased else RouterStatsCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output / "model"))
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} on {arguments.world_size} processes")
        print(f"check it with: deepseekmoe verify {output / 'model'}")


if __name__ == "__main__":
    typer.run(main)
