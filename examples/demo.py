# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Run the demo: upcycle a real dense model, fine-tune it with LoRA on its experts, merge the adapter, generate.

Run it with `make demo`, or with `make demo ARGS=--quick`. With `ARGS='--method qlora'` the adapter is trained over
experts in four bits.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo_data import DemoError, TokenBlocks, obtain_dense_model, reference_blocks, sample_blocks
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modeling_deepseekmoe import StackedExpertsConfig, expert_lora_config, optimize_expert_lora
from modeling_deepseekmoe.analysis.evaluation import expert_load, perplexity
from modeling_deepseekmoe.analysis.plots import plot_expert_load, plot_loss_curve, require_matplotlib
from modeling_deepseekmoe.conversion import UpcyclingPlan, merge_adapter, upcycle_model, verify_upcycling

LOGIT_TOLERANCE = 1e-3
METHODS = ("lora", "qlora")
PROMPT = "The `for` statement is used to iterate over"
_RELOAD_SCRIPT = """
import sys
import torch
import modeling_deepseekmoe
from transformers import AutoModelForCausalLM
folder, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
with torch.no_grad():
    torch.save(model(torch.load(inputs, weights_only=True)).logits, outputs)
"""


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences in a step.
        block_size: tokens in a sequence.
        learning_rate: learning rate of AdamW, with a linear decay to 0.
        lora_rank: rank of the adapters on routed and shared experts.
        held_out_blocks: sequences on which the perplexity is measured.
        new_tokens: tokens that are generated at the end.
        plan: how the dense FFNs are divided.
        required_gain: share by which the held-out perplexity must fall.
        method: `"lora"`, or `"qlora"` for experts in four bits (NF4) under the adapters.
    """

    steps: int = 40
    batch_size: int = 4
    block_size: int = 128
    learning_rate: float = 1e-3
    lora_rank: int = 16
    held_out_blocks: int = 64
    new_tokens: int = 48
    plan: UpcyclingPlan = field(default_factory=lambda: UpcyclingPlan(shared_width=384, num_shards=6, num_copies=4))
    required_gain: float = 0.10
    method: str = "lora"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DemoError(f"method={self.method!r} is not allowed: it must be one of {', '.join(METHODS)}")


QUICK = DemoSettings(steps=10, held_out_blocks=16, new_tokens=16, required_gain=0.0)


def run_demo(
    output: str | Path = "runs/demo",
    settings: DemoSettings | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the demo and return its figures.

    The folder `output` then holds the figures (`metrics.json`), `loss.png`, `expert_load.png`, the upcycled model
    (`model/`), the adapter (`adapter/`) and both merged (`merged/`).

    Raises:
        DemoError: if a step fails. The message names it.
    """
    settings = settings or DemoSettings()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    step = _Steps(echo)
    torch.manual_seed(0)

    with step("Obtain SmolLM2-135M-Instruct"):
        require_matplotlib()
        dense, tokenizer, origin = obtain_dense_model(output, echo)
    with step("Read the Python language reference"):
        train, held_out = reference_blocks(tokenizer, settings.block_size)
        held_out = sample_blocks(held_out, settings.held_out_blocks)
        echo(f"   {len(train)} blocks to train on, {len(held_out)} held out, {settings.block_size} tokens each")
    model, figures = _upcycle(dense, held_out, settings, step)
    del dense
    with step("Save the upcycled model"):
        model.save_pretrained(output / "model")
        tokenizer.save_pretrained(output / "model")
    if settings.method == "qlora":
        model, quantised = _quantise(model, held_out, output, step)
        figures |= quantised
    adapted, trained = _train(model, train, held_out, figures["perplexity_before"], settings, output, step)
    figures |= trained
    with step("Save the adapter, merge it into the model, and load that in a fresh process"):
        if settings.method == "qlora":
            adapted = _over_whole_weights(adapted, output)
        difference = _merge_and_reload(adapted, held_out[:2], output, echo)
        echo(f"   merged against unmerged, max |logit difference| {difference:.2e}")
        if not difference <= LOGIT_TOLERANCE:
            raise DemoError(f"the merged model's logits differ by up to {difference:g}")
    with step("Generate"):
        text = _generate(adapted, tokenizer, settings.new_tokens)
        echo(f"   {text!r}")
    figures = {
        "model": origin,
        **figures,
        "adapter_bytes": (output / "adapter" / "adapter_model.safetensors").stat().st_size,
        "merged_max_logit_difference": difference,
        "generated": text,
        "seconds": round(time.monotonic() - started, 1),
    }
    (output / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    echo("\n" + _table(figures) + f"\n\nPlots and figures: {output}/loss.png, expert_load.png, metrics.json")
    return figures


def _upcycle(
    dense: PreTrainedModel, held_out: torch.Tensor, settings: DemoSettings, step: "_Steps"
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Make the DeepSeekMoE of the dense model, and measure how far they are apart."""
    with step("Upcycle to DeepSeekMoE and compare with the dense model"):
        model = upcycle_model(dense, settings.plan)
        check = verify_upcycling(dense, model, held_out[:2], tolerance=LOGIT_TOLERANCE)
        step.echo(f"   {check}")
        if not check.passed:
            raise DemoError(f"the upcycled model does not equal the dense model: {check}")
    with step("Held-out perplexity before training"):
        batches = held_out.split(8)
        of_dense, before = perplexity(dense, batches), perplexity(model, batches)
        step.echo(f"   dense {of_dense:.3f}, upcycled {before:.3f}")
    config = model.config
    return model, {
        "parameters": model.num_parameters(),
        "experts": f"{config.n_shared_experts} shared + {config.n_routed_experts} routed, "
        f"top-{config.num_experts_per_tok}, width {config.moe_intermediate_size}",
        "dense_vs_upcycled_max_logit_difference": check.max_logit_difference,
        "dense_vs_upcycled_same_greedy_text": check.same_text,
        "perplexity_dense": of_dense,
        "perplexity_before": before,
    }


def _quantise(
    model: PreTrainedModel, held_out: torch.Tensor, output: Path, step: "_Steps"
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the saved model with its routed experts in four bits. Return it, and what that costs and saves."""
    with step("Load it with its routed experts in four bits (NF4)"):
        whole = sum(one.nbytes for name, one in model.named_parameters() if ".experts." in name)
        quantised = AutoModelForCausalLM.from_pretrained(
            output / "model", dtype=torch.float32, quantization_config=StackedExpertsConfig(format="nf4")
        ).eval()
        stored = sum(one.nbytes for name, one in _tensors(quantised) if ".experts." in name)
        after = perplexity(quantised, held_out.split(8))
        step.echo(f"   experts {whole / 1e6:.0f} MB -> {stored / 1e6:.0f} MB, held-out perplexity {after:.3f}")
    return quantised, {"experts_bytes": whole, "quantised_bytes": stored, "perplexity_quantised": after}


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _over_whole_weights(adapted: PeftModel, output: Path) -> PeftModel:
    """Save an adapter that was trained over quantised experts, and load it over those that are not."""
    adapted.save_pretrained(output / "adapter")
    model = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    return optimize_expert_lora(PeftModel.from_pretrained(model, output / "adapter")).eval()


def _train(
    model: PreTrainedModel,
    train: torch.Tensor,
    held_out: torch.Tensor,
    before: float,
    settings: DemoSettings,
    output: Path,
    step: "_Steps",
) -> tuple[PeftModel, dict[str, Any]]:
    """Train adapters on the model. Return the adapted model, and figures of the training and its gain."""
    with step("Fine-tune with LoRA on the experts: peft and transformers.Trainer"):
        adapted = adapt(model, settings)
        history = fine_tune(adapted, train, settings, output)
        trained = sum(one.numel() for one in adapted.parameters() if one.requires_grad)
        step.echo(f"   {trained:,} parameters trained, beside the frozen ones")
    with step("Held-out perplexity after training"):
        after = perplexity(adapted, held_out.split(8))
        gain = 1 - after / before
        step.echo(f"   {after:.3f}, {gain:.1%} lower")
        if gain < settings.required_gain:
            raise DemoError(f"the perplexity fell by {gain:.1%}, less than {settings.required_gain:.0%}")
    with step("Plot the loss and the expert load"):
        plot_loss_curve([row["step"] for row in history], [row["loss"] for row in history], output / "loss.png")
        load = expert_load(model, held_out.split(8))
        plot_expert_load(load, output / "expert_load.png", "Expert load on held-out text, after training")
    return adapted, {
        "trained_parameters": trained,
        "optimizer_steps": settings.steps,
        "perplexity_after": after,
        "perplexity_gain": gain,
    }


class _Steps:
    """Numbers and times the steps. Turns any failure into one line that says which step failed, and why."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self.echo, self.number = echo, 0

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        self.number += 1
        self.echo(f"[{self.number}] {title} ...")
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            raise DemoError(f"Step {self.number} ({title}): {type(error).__name__}: {error}") from error
        self.echo(f"    done in {time.monotonic() - started:.1f} s")


# --------------------------------------------------------------------------------------------- training, saving, using
def adapt(model: PreTrainedModel, settings: DemoSettings) -> PeftModel:
    """Add LoRA adapters to routed and shared experts."""
    return get_peft_model(model, expert_lora_config(model, r=settings.lora_rank, target_modules=("shared_experts",)))


def fine_tune(
    adapted: PeftModel, blocks: torch.Tensor, settings: DemoSettings, output: Path
) -> list[dict[str, float]]:
    """Train the adapters. Return the logged steps with losses."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=TokenBlocks(blocks))
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def _merge_and_reload(adapted: PeftModel, input_ids: torch.Tensor, output: Path, echo: Callable[[str], None]) -> float:
    folder, inputs, logits = output / "merged", output / "inputs.pt", output / "logits.pt"
    adapted.eval().to("cpu")  # where the fresh process computes: another device would round differently
    adapted.save_pretrained(output / "adapter")
    shutil.rmtree(folder, ignore_errors=True)
    echo(f"   {merge_adapter(output / 'model', output / 'adapter', folder)}")
    torch.save(input_ids, inputs)
    command = [sys.executable, "-c", _RELOAD_SCRIPT, str(folder), str(inputs), str(logits)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DemoError(f"the fresh process failed: {result.stderr.strip()[-800:]}")
    with torch.no_grad():
        expected = adapted(input_ids).logits
    difference = float((torch.load(logits, weights_only=True) - expected).abs().max())
    inputs.unlink()
    logits.unlink()
    return difference


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _table(figures: dict[str, Any]) -> str:
    rows = [
        ("model", figures["model"]),
        ("experts", figures["experts"]),
        ("parameters", f"{figures['parameters']:,}"),
        (
            "trained: LoRA on the experts",
            f"{figures['trained_parameters']:,}, {figures['adapter_bytes'] / 1e6:.0f} MB",
        ),
        ("dense vs upcycled, max |logit difference|", f"{figures['dense_vs_upcycled_max_logit_difference']:.2e}"),
        ("dense vs upcycled, greedy text", "the same" if figures["dense_vs_upcycled_same_greedy_text"] else "differs"),
        ("held-out perplexity, dense", f"{figures['perplexity_dense']:.3f}"),
        ("held-out perplexity, upcycled", f"{figures['perplexity_before']:.3f}"),
        *_quantised_rows(figures),
        (
            f"held-out perplexity, after {figures['optimizer_steps']} steps",
            f"{figures['perplexity_after']:.3f} ({figures['perplexity_gain']:.1%} lower)",
        ),
        ("merged vs adapter, max |logit difference|", f"{figures['merged_max_logit_difference']:.2e}"),
        ("time", f"{figures['seconds']:.0f} s"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}} | {value}" for label, value in rows)


def _quantised_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    if "perplexity_quantised" not in figures:
        return []
    sizes = f"{figures['experts_bytes'] / 1e6:.0f} -> {figures['quantised_bytes'] / 1e6:.0f} MB"
    return [
        ("routed experts, in four bits", sizes),
        ("held-out perplexity, experts in four bits", f"{figures['perplexity_quantised']:.3f}"),
    ]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of the full run.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for plots, figures and the model.")] = Path("runs/demo"),
    method: Annotated[str, typer.Option(help="lora, or qlora for experts in four bits under the adapter.")] = "lora",
) -> None:
    """Upcycle a real model, fine-tune it on real text, save it, load it again and generate."""
    try:
        run_demo(output, replace(QUICK if quick else DemoSettings(), method=method), typer.echo)
    except DemoError as error:
        typer.echo(f"Failed: {error}", err=True)
        raise typer.Exit(1) from error


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
