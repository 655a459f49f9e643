"""Fine-tune a DeepSeekMoE with LoRA on its experts, in one process, or in many that share the frozen model.

    make demo                                                    # leaves a small model in runs/demo/model
    python examples/finetune_lora_fsdp2.py                       # one process
    accelerate launch --config_file configuration/accelerate/fsdp2_lora.yaml --num_processes 4 \\
        examples/finetune_lora_fsdp2.py --model deepseek-ai/DeepSeek-V2-Lite

All files of configuration/accelerate work, except fsdp2_cpu_offload.yaml; --tp-size and --ep-size work too. The data
here are pages of Python's language reference.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from demo_data import TokenBlocks, reference_blocks
from peft import get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments, default_data_collator, set_seed

import modeling_deepseekmoe
from modeling_deepseekmoe import ShardedTrainer, expert_lora_config, load_tokenizer, sharding_of_launch


@dataclass
class Settings:
    """Options of the example: what is adapted, and how the processes share the work."""

    model: str = field(default="runs/demo/model", metadata={"help": "Checkpoint folder or hub id."})
    output: Path = field(
        default=Path("runs/lora-fsdp2"), metadata={"help": "Folder of the checkpoints and the adapter."}
    )
    rank: int = field(default=16, metadata={"help": "Rank of every adapter."})
    steps: int = field(default=20, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a step, all processes together."})
    learning_rate: float = field(default=0.001, metadata={"help": "Of AdamW, with a linear decay."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    save_steps: int = field(default=10, metadata={"help": "Steps between checkpoints."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last complete checkpoint."})
    tp_size: int = field(default=1, metadata={"help": "Processes that share a batch and every layer."})
    ep_size: int = field(default=1, metadata={"help": "Processes that hold different experts."})


def main(settings: Settings) -> None:
    """Train an adapter and save it."""
    sharding = sharding_of_launch(tp_size=settings.tp_size if settings.tp_size > 1 else None, ep_size=settings.ep_size)
    batches = int(os.environ.get("WORLD_SIZE", "1")) // (1 if sharding is None else sharding.tp_size)
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps,
        per_device_train_batch_size=max(1, settings.batch_size // batches),
        learning_rate=settings.learning_rate,
        bf16=bf16,
        gradient_checkpointing=True,
        logging_steps=1,
        save_steps=settings.save_steps,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # processes without a GPU do not find each other otherwise
    )
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(settings.model)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, distributed_config=sharding)
    set_seed(arguments.seed)  # the adapters begin with the same values in every process
    config = expert_lora_config(base, r=settings.rank, target_modules=("self_attn", "shared_experts"))
    adapted = get_peft_model(base, config)
    trainer = ShardedTrainer(
        adapted,
        arguments,
        train_dataset=TokenBlocks(reference_blocks(tokenizer, settings.block_size)[0]),
        processing_class=tokenizer,
        data_collator=default_data_collator,  # the blocks have one length
    )
    trainer.train(resume_from_checkpoint=settings.resume)
    trainer.save_model(str(settings.output / "adapter"))
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} on {arguments.world_size} processes")
        adapter, merged = settings.output / "adapter", settings.output / "merged"
        print(f"merge it with: deepseekmoe merge {settings.model} {adapter} {merged}")


if __name__ == "__main__":
    main(HfArgumentParser(Settings).parse_args_into_dataclasses()[0])
