"""Train all parameters of a DeepSeekMoE, in one process or many. A checkpoint resumes on another number of processes.

    make demo                                                    # leaves a small model in runs/demo/model
    python examples/train_fsdp2.py                               # one process
    accelerate launch --config_file configuration/accelerate/fsdp2_full.yaml --num_processes 8 \\
        examples/train_fsdp2.py --model deepseek-ai/DeepSeek-V2-Lite
    accelerate launch --config_file configuration/accelerate/fsdp2_full.yaml --num_processes 8 \\
        examples/train_fsdp2.py --ep-size 8                      # the experts lie on different processes

Every file of configuration/accelerate works. The data here are pages of Python's language reference.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from demo_data import TokenBlocks, reference_blocks
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments, default_data_collator

import modeling_deepseekmoe
from modeling_deepseekmoe import (
    LoadBalancingCallback,
    RouterStatsCallback,
    ShardedTrainer,
    load_tokenizer,
    sharding_of_launch,
)


@dataclass
class Settings:
    """Options of the example: what is trained, and how the processes share the work."""

    model: str = field(default="runs/demo/model", metadata={"help": "Checkpoint folder or hub id."})
    output: Path = field(default=Path("runs/train"), metadata={"help": "Folder of the checkpoints and the model."})
    steps: int = field(default=20, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a step, all processes together."})
    accumulate: int = field(default=1, metadata={"help": "Micro-batches that a process makes of its part."})
    learning_rate: float = field(default=0.0001, metadata={"help": "Of AdamW, with a linear decay."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    save_steps: int = field(default=10, metadata={"help": "Steps between checkpoints."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint."})
    tp_size: int = field(default=1, metadata={"help": "Processes that share a batch and every layer."})
    ep_size: int = field(default=1, metadata={"help": "Processes that hold different experts."})


def main(settings: Settings) -> None:
    """Train with checkpoints, and save the model under the official names."""
    sharding = sharding_of_launch(tp_size=settings.tp_size if settings.tp_size > 1 else None, ep_size=settings.ep_size)
    batches = int(os.environ.get("WORLD_SIZE", "1")) // (1 if sharding is None else sharding.tp_size)
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps,
        per_device_train_batch_size=max(1, settings.batch_size // batches // settings.accumulate),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=settings.save_steps,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # processes without a GPU do not find each other otherwise
    )
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(settings.model)
    # In float32, which the optimizer needs; bf16=True computes in bfloat16.
    trained = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32, distributed_config=sharding)
    biased = trained.config.topk_method == "noaux_tc"
    trainer = ShardedTrainer(
        trained,
        arguments,
        train_dataset=TokenBlocks(reference_blocks(tokenizer, settings.block_size)[0]),
        processing_class=tokenizer,
        data_collator=default_data_collator,  # the blocks have one length
        callbacks=[LoadBalancingCallback() if biased else RouterStatsCallback()],
    )
    trainer.train(resume_from_checkpoint=settings.resume)
    trainer.save_model(str(settings.output / "model"))
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} on {arguments.world_size} processes")
        print(f"check it with: deepseekmoe verify {settings.output / 'model'}")


if __name__ == "__main__":
    main(HfArgumentParser(Settings).parse_args_into_dataclasses()[0])
