"""Give a model a drafter: train a multi-token-prediction layer on the model's own text, and generate faster with it.

    make demo                             # leaves a small model in runs/demo/model
    python examples/train_drafter.py      # about ten minutes on two cores

The model is frozen. The data are texts and the model's own greedy continuations of them, since these are what it will
be asked to draft. Every eighth page is held out.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from demo_data import TokenBlocks, reference_blocks, sample_blocks
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

import modeling_deepseekmoe
from modeling_deepseekmoe import add_mtp, load_tokenizer
from modeling_deepseekmoe.support.folders import check_destination


@dataclass
class Settings:
    """Options of the example: which model, on what it is trained, and how long."""

    model: str = field(default="runs/demo/model", metadata={"help": "Checkpoint folder or hub id."})
    output: Path = field(default=Path("runs/drafter"), metadata={"help": "Folder of the model; must not exist."})
    depth: int = field(default=1, metadata={"help": "Layers to add; one may draft several tokens."})
    initialisation: str = field(default="last_layer", metadata={"help": "last_layer or random."})
    continuations: int = field(default=128, metadata={"help": "Texts that the model continues."})
    prompt_tokens: int = field(default=32, metadata={"help": "Tokens of each text that it continues."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a step."})
    learning_rate: float = field(default=0.001, metadata={"help": "Of AdamW, with a linear decay."})
    held_out: int = field(default=8, metadata={"help": "Held-out prompts to draft behind."})


@torch.no_grad()
def continued(model: PreTrainedModel, prompts: torch.Tensor, length: int, batch_size: int = 128) -> torch.Tensor:
    """Continue prompts (B, P) greedily to sequences (B, length)."""
    mask, batches = torch.ones_like(prompts), []
    for batch, own in zip(prompts.split(batch_size), mask.split(batch_size), strict=True):
        batches.append(
            model.generate(batch, attention_mask=own, max_length=length, min_length=length, do_sample=False)
        )
    return torch.cat(batches)


def main(settings: Settings) -> None:
    """Make the data, train the new layer, save the model, load it again, and generate with both."""
    check_destination(settings.output)
    modeling_deepseekmoe.register(override_native=True)
    tokenizer = load_tokenizer(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    model.requires_grad_(False)
    train_blocks, test_blocks = reference_blocks(tokenizer, settings.block_size)

    start = time.perf_counter()
    prompts = sample_blocks(train_blocks, settings.continuations)[:, : settings.prompt_tokens]
    own_text = continued(model, prompts, settings.block_size)
    print(f"{own_text.numel():,} tokens of the model's own in {time.perf_counter() - start:.0f} s")

    add_mtp(model, settings.depth, settings.initialisation)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{trained:,} of {model.num_parameters():,} parameters are trained")
    arguments = TrainingArguments(
        output_dir=str(settings.output.with_name(f"{settings.output.name}-trainer")),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.steps // 20,
        logging_steps=max(settings.steps // 10, 1),
        save_strategy="no",
        report_to="none",
    )
    data = torch.cat([train_blocks, own_text.repeat(max(len(train_blocks) // len(own_text), 1), 1)])
    Trainer(model, arguments, train_dataset=TokenBlocks(data)).train()
    model.save_pretrained(settings.output)
    tokenizer.save_pretrained(settings.output)
    print(f"trained and saved after {(time.perf_counter() - start) / 60:.1f} minutes")

    model = AutoModelForCausalLM.from_pretrained(settings.output, mtp=True).eval()
    prompts = sample_blocks(test_blocks, settings.held_out)[:, : settings.prompt_tokens]
    options = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True}
    seconds, same, shares = {False: 0.0, True: 0.0}, 0, []
    for prompt in prompts:
        found = {}
        for use_mtp in (False, True):
            begin = time.perf_counter()
            inputs = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt[None])}
            found[use_mtp] = model.generate(**inputs, **options, use_mtp=use_mtp)
            seconds[use_mtp] += time.perf_counter() - begin
        same += torch.equal(found[True].sequences, found[False].sequences)
        shares.append(torch.tensor(found[True].mtp_acceptance))
    share = ", ".join(f"{one:.0%}" for one in torch.stack(shares).mean(dim=0).tolist())
    print(f"held-out pages: accepted drafts by depth {share}; {seconds[False] / seconds[True]:.2f} times as fast")
    print(f"the same text as without drafts for {same} of {len(prompts)} prompts")


if __name__ == "__main__":
    main(HfArgumentParser(Settings).parse_args_into_dataclasses()[0])
