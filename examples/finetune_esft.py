"""Find the experts that a task uses, and train only these: expert-specialised fine-tuning (ESFT, arXiv 2407.01906).

    make demo                             # leaves a small model in runs/demo/model
    python examples/finetune_esft.py      # full weights of the selected experts, everything else frozen

The task here is Python's language reference. Every eighth page is held out.
"""

from dataclasses import dataclass, field
from pathlib import Path

from demo_data import TokenBlocks, reference_blocks, sample_blocks
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

import modeling_deepseekmoe
from modeling_deepseekmoe import (
    ExpertSelection,
    load_tokenizer,
    prepare_esft,
    save_esft,
    score_experts,
    select_experts,
)
from modeling_deepseekmoe.analysis.evaluation import perplexity
from modeling_deepseekmoe.esft.scoring import selection_table
from modeling_deepseekmoe.support.folders import check_destination


@dataclass
class Settings:
    """Options of the example: what is scored, selected and trained."""

    model: str = field(default="runs/demo/model", metadata={"help": "Checkpoint folder or hub id."})
    output: Path = field(
        default=Path("runs/esft"), metadata={"help": "Folder of the trained experts; must not exist."}
    )
    method: str = field(default="gate", metadata={"help": "gate or token."})
    threshold: float = field(default=0.1, metadata={"help": "The paper: 0.1 for gate, 0.2 for token."})
    samples: int = field(default=64, metadata={"help": "Sequences to score the experts on."})
    steps: int = field(default=20, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=0.0003, metadata={"help": "Of AdamW, with a linear decay."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    held_out: int = field(default=32, metadata={"help": "Held-out sequences to measure on."})


def main(settings: Settings) -> None:
    """Score the experts, select some, train these, and save what was trained."""
    check_destination(settings.output)
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(settings.model)
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    total = base.num_parameters()
    train_blocks, test_blocks = reference_blocks(tokenizer, settings.block_size)
    batches = sample_blocks(test_blocks, settings.held_out).split(8)
    before = perplexity(base, batches)

    scores = score_experts(base, sample_blocks(train_blocks, settings.samples).split(8), settings.method)
    selection = ExpertSelection(select_experts(scores, settings.threshold))
    print(selection_table(selection, scores))
    prepare_esft(base, selection)
    trained = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    print(f"{trained:,} of {total:,} parameters are trained, {trained / total:.1%}")

    arguments = TrainingArguments(
        output_dir=str(settings.output.with_name(f"{settings.output.name}-trainer")),
        max_steps=settings.steps,
        per_device_train_batch_size=4,
        learning_rate=settings.learning_rate,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    Trainer(base, arguments, train_dataset=TokenBlocks(train_blocks)).train()
    size = save_esft(base, settings.output)
    after = perplexity(base, batches)
    print(f"held-out perplexity {before:.3f} -> {after:.3f}; {size / 1e6:.1f} MB in {settings.output}")
    merged = settings.output.with_name(f"{settings.output.name}-merged")
    print(f"apply it with: deepseekmoe merge {settings.model} {settings.output} {merged}")


if __name__ == "__main__":
    main(HfArgumentParser(Settings).parse_args_into_dataclasses()[0])
