# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command line, `deepseekmoe`. Exit code 2 for a user's mistake, 1 for a failed check."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    Column,
    DeviceMap,
    Dtype,
    FailedCheck,
    Model,
    Resume,
    ShardSize,
    Split,
    Subset,
    Tokenizer,
    TrustRemoteCode,
    allow_only,
    bytes_bar,
    check_dtype,
    check_file,
    exit_codes,
    load_model,
)
from .cli_push import push

app = typer.Typer(
    name="deepseekmoe",
    help="DeepSeekMoE for the Hugging Face ecosystem.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options() -> None:
    """DeepSeekMoE for the Hugging Face ecosystem."""


@app.command()
def inspect(
    context: typer.Context,
    name_or_folder: Annotated[str, typer.Argument(help="A preset's name, or a checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Also read every weight, as `deepseekmoe verify`.")] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank for the LoRA memory figure.")] = 16,
    gpus: Annotated[int | None, typer.Option(help="Plan training on that many GPUs instead.")] = None,
    gpu_memory: Annotated[str, typer.Option(help="Of one GPU, as 80GB.")] = "80GB",
    gpus_per_machine: Annotated[int, typer.Option(help="GPUs with fast links between them.")] = 8,
    method: Annotated[str, typer.Option(help="full, lora or esft.")] = "full",
    esft_share: Annotated[float, typer.Option(help="Share of the routed experts that ESFT trains.")] = 0.1,
    tokens: Annotated[int, typer.Option(help="Tokens of one micro-batch on one GPU.")] = 4096,
) -> None:
    """Show parameters, FLOPs, cache and memory of a preset or a checkpoint folder, or which training fits."""
    from .inspection import inspect_model

    with exit_codes():
        if gpus is not None:
            if check:
                raise ValueError("--check is not allowed together with --gpus.")
            from .planning import plan_table, plan_training

            plans = plan_training(
                name_or_folder,
                gpus=gpus,
                gpu_memory=gpu_memory,
                gpus_per_machine=gpus_per_machine,
                method=method,
                lora_rank=lora_rank,
                esft_share=esft_share,
                tokens=tokens,
            )
            typer.echo(json.dumps([plan.to_dict() for plan in plans], indent=2) if as_json else plan_table(plans))
            return
        allow_only(context, "without --gpus", "name_or_folder", "as_json", "check", "lora_rank")
        report = inspect_model(name_or_folder, lora_rank=lora_rank)
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.to_text())
        if check:
            if not Path(name_or_folder).is_dir():
                raise ValueError(f"--check is not allowed for the preset {name_or_folder!r}: it has no weights.")
            from modeling_deepseekmoe.conversion import VerificationError, verify

            try:
                checked = verify(name_or_folder)
            except (VerificationError, ValueError) as error:
                raise FailedCheck(str(error)) from error
            typer.echo(str(checked), err=as_json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint folder or hub id; with --dry-run also a preset's name.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    to: Annotated[
        str | None, typer.Option(help="Dialect: deepseekmoe, deepseek, deepseek_v2 or deepseek_v3; the source's own.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="per-expert or stacked; the source's own.")] = None,
    dtype: Annotated[str, typer.Option(help="keep, float32, bfloat16, float16 or fp8.")] = "keep",
    max_shard_size: ShardSize = "5GB",
    drop_mtp: Annotated[bool, typer.Option("--drop-mtp", help="Leave multi-token-prediction layers out.")] = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Convert a checkpoint's dialect, layout of the experts, or dtype, streaming from folder to folder."""
    from modeling_deepseekmoe.conversion.converting import carry_out, plan_conversion

    from .folders import check_destination

    with exit_codes():
        if not (dry_run or resume):
            check_destination(destination)
        plan = plan_conversion(
            source,
            to=to,
            layout=layout,
            dtype=dtype,
            max_shard_size=max_shard_size,
            drop_mtp=drop_mtp,
            without_weights=dry_run,
        )
        typer.echo(json.dumps(plan.to_dict(), indent=2) if as_json else plan.to_text())
        if not dry_run:
            with bytes_bar(plan.nbytes) as bar:
                carry_out(plan, destination, resume=resume, report=bar.write, progress=bar.update)
            typer.echo(f"{destination}: complete.", err=as_json)


@app.command()
def verify(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    other: Annotated[
        str | None, typer.Argument(help="Another one to compare with, of any layout, dtype and dialect.")
    ] = None,
    write_manifest: Annotated[
        bool, typer.Option("--write-manifest", help="Write the SHA-256 of every tensor into the folder.")
    ] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Also compare logits on random tokens.")] = False,
    tolerance: Annotated[float, typer.Option(help="Largest allowed logit difference.")] = 1e-3,
) -> None:
    """Prove that a checkpoint is whole, and that two of them hold the same model."""
    from modeling_deepseekmoe.conversion import VerificationError
    from modeling_deepseekmoe.conversion.verifying import bytes_to_read
    from modeling_deepseekmoe.conversion.verifying import verify as run

    with exit_codes():
        if logits and other is None:
            raise ValueError("--logits is not allowed without another checkpoint to compare with.")
        if not logits:
            allow_only(context, "without --logits", "checkpoint", "other", "write_manifest")
        try:
            with bytes_bar(bytes_to_read(checkpoint, other)) as bar:
                result = run(
                    checkpoint,
                    other,
                    write_manifest=write_manifest,
                    logits=logits,
                    tolerance=tolerance,
                    report=bar.write,
                    progress=bar.update,
                )
        except (VerificationError, ValueError) as error:
            raise FailedCheck(str(error)) from error
        typer.echo(str(result))


@app.command()
def upcycle(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a dense Llama, Mistral, Qwen2 or SmolLM2 model.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    shared_width: Annotated[int, typer.Option(help="Neurons of each FFN that become the shared experts.")],
    shards: Annotated[int, typer.Option(help="G, shards of the other neurons; top-K is G.")],
    copies: Annotated[int, typer.Option(help="C, copies of every shard; there are G * C routed experts.")],
    first_k_dense: Annotated[int, typer.Option(help="First layers that stay dense.")] = 0,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the router's rows.")] = 0.3,
    noise: Annotated[float, typer.Option(help="Noise on the routed experts, in their standard deviations.")] = 0.0,
    dialect: Annotated[str, typer.Option(help="deepseekmoe or deepseek.")] = "deepseekmoe",
    dtype: Annotated[str, typer.Option(help="Dtype to save in: keep, float32, bfloat16 or float16.")] = "keep",
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the source folder.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest allowed logit difference.")] = 1e-3,
    check_tokens: Annotated[int, typer.Option(help="Length of the greedy text that must be the same.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the router and the noise.")] = 0,
    max_shard_size: ShardSize = "5GB",
    resume: Resume = False,
) -> None:
    """Turn a dense model into a DeepSeekMoE that computes the same, and verify it before anything is written."""
    from modeling_deepseekmoe.conversion import UpcyclingError, UpcyclingPlan
    from modeling_deepseekmoe.conversion import upcycle as run

    with exit_codes():
        plan = UpcyclingPlan(
            shared_width=shared_width,
            num_shards=shards,
            num_copies=copies,
            first_k_dense=first_k_dense,
            router_std=router_std,
            noise=noise,
            dialect=dialect,
            seed=seed,
        )
        try:
            check = run(
                source,
                destination,
                plan,
                dtype=dtype,
                gguf_file=gguf_file,
                tolerance=tolerance,
                check_tokens=check_tokens,
                max_shard_size=max_shard_size,
                resume=resume,
                report=typer.echo,
            )
        except UpcyclingError as error:
            raise FailedCheck(str(error)) from error
        typer.echo(f"{destination}: {check}")


@app.command()
def report(
    model: Model,
    data: Annotated[str, typer.Option(help="Text file, .jsonl, .json, .csv, .parquet, or a dataset's folder or id.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("routing_report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers instead of writing the page.")] = False,
    column: Column = "text",
    split: Split = "train",
    subset: Subset = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to look at.")] = 32768,
    block_size: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Show what the gates do with a text: load, imbalance, co-activation, weights and top tokens of every expert."""
    from .report import require_matplotlib
    from .routing_report import make_report, read_texts

    with exit_codes():
        check_dtype(dtype)
        if not as_json:
            require_matplotlib()
            check_file(output)
        result = make_report(
            *load_model(model, tokenizer, dtype, device_map, trust_remote_code),
            read_texts(data, split=split, column=column, subset=subset),
            title=model,
            source=Path(data).name if Path(data).exists() else data,
            max_tokens=max_tokens,
            block_size=block_size,
            batch_size=batch_size,
        )
        if as_json:
            typer.echo(json.dumps(result.to_dict(), indent=2))
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(result.to_html(), encoding="utf-8")
        violation = sum(result.global_violation) / len(result.global_violation)
        typer.echo(f"{output}: {len(result.trace.layers)} layers, MaxVio_global {violation:.3f} on average.")


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint.")],
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a LoRA adapter, or an ESFT folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
) -> None:
    """Merge an adapter into its base, file by file, and prove that it computes the same."""
    from modeling_deepseekmoe.conversion import MergingError, merge_adapter

    with exit_codes():
        try:
            result = merge_adapter(base, adapter, out, report=typer.echo)
        except MergingError as error:
            raise FailedCheck(str(error)) from error
        typer.echo(f"{out}: {result}.")


@app.command()
def export_adapter(
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a LoRA adapter on routed experts.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    layout: Annotated[str, typer.Option(help="per-expert or peft.")],
    num_experts: Annotated[
        int | None, typer.Option(help="For peft: experts of a layer, where not all have an adapter.")
    ] = None,
) -> None:
    """Write an adapter with one pair of factors for every expert's projections, or in PEFT's stacked layout."""
    from modeling_deepseekmoe.conversion import export_adapter as run

    with exit_codes():
        typer.echo(f"{out}: {run(adapter, out, layout, num_experts)} tensors.")


app.command()(push)


@app.command()
def esft_select(
    model: Model,
    data: Annotated[str, typer.Option(help="The task: a text file, .jsonl, .json, .csv, .parquet, or a dataset.")],
    out: Annotated[Path, typer.Option(help="File to write the selection to.")] = Path("esft.json"),
    method: Annotated[str, typer.Option(help="gate or token.")] = "gate",
    threshold: Annotated[float | None, typer.Option(help="Score to reach; 0.1 for gate, 0.2 for token.")] = None,
    scores: Annotated[Path | None, typer.Option(help="File to write all scores to.")] = None,
    column: Column = "text",
    split: Split = "train",
    subset: Subset = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to look at.")] = 131072,
    block_size: Annotated[int, typer.Option(help="Tokens in a sample; at most the model's context.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 1,
    tokenizer: Tokenizer = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Select the experts that a task uses, for expert-specialised fine-tuning."""
    from .esft import METHODS, ExpertSelection, save_scores, score_experts, select_experts, selection_table
    from .routing_report import read_texts, token_batches

    with exit_codes():
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not allowed: it must be 'gate' or 'token'.")
        threshold = {"gate": 0.1, "token": 0.2}[method] if threshold is None else threshold
        select_experts({}, threshold)
        for path in (out, scores):
            if path is not None:
                check_file(path)
        loaded, own_tokenizer = load_model(model, tokenizer, dtype, device_map, trust_remote_code)
        block_size = min(block_size, loaded.config.max_position_embeddings)
        texts = read_texts(data, split=split, column=column, subset=subset)
        batches = token_batches(
            texts, own_tokenizer, max_tokens=max_tokens, block_size=block_size, batch_size=batch_size
        )
        total = sum(batch.numel() for batch in batches)
        with typer.progressbar(length=total, label="tokens", file=sys.stderr) as bar:
            values = score_experts(loaded, batches, method, progress=bar.update)
        selection = ExpertSelection(select_experts(values, threshold))
        for path in (out, scores):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        if scores is not None:
            save_scores(values, method, scores)
        selection.save(out)
        typer.echo(selection_table(selection, values))
        typer.echo(f"{out}: {method} scores of {total} tokens, threshold {threshold:g}.")


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of the full run.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for plots, figures and the model.")] = Path("runs/demo"),
) -> None:
    """Upcycle a real model, fine-tune it on real text, save it, load it again and generate."""
    from .demo import QUICK, DemoError, DemoSettings, run_demo

    with exit_codes():
        try:
            run_demo(output, QUICK if quick else DemoSettings(), typer.echo)
        except DemoError as error:
            raise FailedCheck(str(error)) from error


def main() -> None:
    """Entry point of the `deepseekmoe` command."""
    app()


if __name__ == "__main__":
    main()
