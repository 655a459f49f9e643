"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): find the experts that a task uses and train only these.

    make demo                             # leaves a small model in runs/demo/model
    python examples/finetune_esft.py      # full weights of the selected experts, everything else frozen

The task here is Python's language reference; every eighth page is held out.
"""

from pathlib import Path
from typing import Annotated

import typer
from demo_data import TokenBlocks, reference_blocks, sample_blocks
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

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


def main(
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub id.")] = "runs/demo/model",
    output: Annotated[Path, typer.Option(help="Folder of the trained experts; must not exist.")] = Path("runs/esft"),
    method: Annotated[str, typer.Option(help="gate or token.")] = "gate",
    threshold: Annotated[float, typer.Option(help="The paper: 0.1 for gate, 0.2 for token.")] = 0.1,
    samples: Annotated[int, typer.Option(help="Sequences to score the experts on.")] = 64,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, with a linear decay.")] = 3e-4,
    block_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    held_out: Annotated[int, typer.Option(help="Held-out sequences to measure on.")] = 32,
) -> None:
    """Score, select, train, and save what was trained."""
    check_destination(output)
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    total = base.num_parameters()
    train_blocks, test_blocks = reference_blocks(tokenizer, block_size)
    batches = sample_blocks(test_blocks, held_out).split(8)
    before = perplexity(base, batches)

    scores = score_experts(base, sample_blocks(train_blocks, samples).split(8), method)
    selection = ExpertSelection(select_experts(scores, threshold))
    print(selection_table(selection, scores))
    prepare_esft(base, selection)
    trained = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    print(f"{trained:,} of {total:,} parameters are trained, {trained / total:.1%}")

    arguments = TrainingArguments(
        output_dir=str(output.with_name(f"{output.name}-trainer")),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=learning_rate,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    Trainer(base, arguments, train_dataset=TokenBlocks(train_blocks)).train()
    size = save_esft(base, output)
    print(f"held-out perplexity {before:.3f} -> {perplexity(base, batches):.3f}; {size / 1e6:.1f} MB in {output}")
    print(f"apply it with: deepseekmoe merge {model} {output} {output.with_name(f'{output.name}-merged')}")


if __name__ == "__main__":
    typer.run(main)
