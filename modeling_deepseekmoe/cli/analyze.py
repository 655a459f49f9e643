# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The command `deepseekmoe analyze`: measure how specialised a model's experts are."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import ModelOptions, PageOptions, TextOptions, named, takes, write_page


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(TextOptions, PageOptions, ModelOptions):
    """Options of `deepseekmoe analyze`: which models read which text, what is measured, and where the page goes."""

    domains: Annotated[str | None, typer.Option(help="Field of the rows that names the domain of the text.")] = None
    against: Annotated[str | None, typer.Option(help="Another model, beside the first on the same page.")] = None
    max_tokens: Annotated[int, typer.Option(help="Tokens to read, of all domains together.")] = 16384
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 512
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4
    single_experts: Annotated[
        int, typer.Option(help="Mask so many experts of each layer one by one; a pass for each.")
    ] = 0
    output_tokens: Annotated[int, typer.Option(help="Tokens for which every expert's output is computed.")] = 128


@takes(AnalyzeOptions)
def analyze(options: AnalyzeOptions) -> None:
    """Show how specialised the experts are: what the model loses without them, their domains, how alike they are."""
    output = options.check_page("specialisation.html")
    models = [options, *([] if options.against is None else [replace(options, model=options.against, tokenizer=None)])]
    block_size = _check_models(models)
    texts = _texts_by_domain(options)
    titles = _titles([one.model for one in models])
    sized = [replace(one, block_size=block_size) for one in models]
    measured = []
    for one, title in zip(sized, titles, strict=True):
        with named(one.model):
            measured.append(_measure(one, title, texts))
    if options.as_json:
        numbers = [one.to_dict(show) for one, show in measured]
        typer.echo(json.dumps(numbers[0] if options.against is None else numbers, indent=2))
        return
    from ..analysis.specialisation_page import make_page

    write_page(make_page(*measured[0], *measured[1:]), output)
    for one, _ in measured:
        typer.echo(f"{one.title}: loss {one.loss:.4f} nats")
        for section in one.sections.values():
            if said := section.empty or section.summary:
                typer.echo(f"  {section.heading}: {said}")
    typer.echo(f"{output} is written.")


def _texts_by_domain(options: AnalyzeOptions) -> dict[str, list[str]] | None:
    from ..analysis.texts import read_domains

    if options.domains is None:
        options.texts()  # for a mistake to show; every model reads them anew
        return None
    return read_domains(
        options.data,
        options.domains,
        split=options.split,
        column=options.column,
        subset=options.subset,
        max_characters=64 * options.max_tokens,
    )


def _check_models(models: list[AnalyzeOptions]) -> int:
    """Look at the configs of the models before the first is measured, and return the tokens of a sequence.

    Raises:
        ValueError: if one cannot be loaded, or has no MoE layers, or none that can be measured.
        OSError: if there is no such folder or repository.
    """
    from transformers import AutoConfig

    from ..analysis.evaluation import traced_layers
    from ..analysis.meta_models import meta_model
    from ..integrations.registration import register

    block_size = models[0].block_size
    register(override_native=True)
    for options in models:
        options.check()
        with named(options.model):
            config = AutoConfig.from_pretrained(_base_of(options.model))
            traced_layers(meta_model(config))
        longest = getattr(config.get_text_config(), "max_position_embeddings", None) or block_size
        if longest < block_size:
            block_size = longest
            typer.echo(f"Sequences have {longest} tokens: {options.model} takes no longer ones.", err=True)
    return block_size


def _base_of(model: str) -> str:
    """Return the base of an adapter's folder, which has no config, or the model itself."""
    file = Path(model) / "adapter_config.json"
    if not file.exists() or (Path(model) / "config.json").exists():
        return model
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError("it is an adapter, and does not name its base: merge both with `deepseekmoe merge`.")
    return str(base)


def _titles(models: list[str]) -> list[str]:
    """Name models: folders without their paths, unless the names are the same then."""
    short = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    return short if len(set(short)) == len(short) else models


def _measure(options: AnalyzeOptions, title: str, texts: dict[str, list[str]] | None) -> tuple[Any, Any]:
    """Load a model and measure it. Return the result, and what makes text of its token ids."""
    from ..analysis.routing_report import shown_token
    from ..analysis.specialisation import measure_specialisation
    from ..analysis.texts import domain_batches, token_batches

    model, tokenizer = options.load()
    sizes: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "block_size": options.block_size,
        "batch_size": options.batch_size,
    }
    left_out: list[str] = []
    if texts is None:
        batches = {"": token_batches(options.texts(), tokenizer, **sizes)}
    else:
        batches, left_out = domain_batches(texts, tokenizer, **sizes)
    notes = tuple(f"Left out: {domain}" for domain in left_out)
    for note in notes:
        typer.echo(note, err=True)
    with typer.progressbar(length=1, label=title, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        measured = measure_specialisation(
            model,
            batches,
            title=title,
            source=options.source,
            single_experts=options.single_experts,
            output_tokens=options.output_tokens,
            progress=show,
        )
    by_domain = measured.sections["domains"]
    measured.sections["domains"] = replace(by_domain, notes=(*by_domain.notes, *notes))
    return measured, lambda token_id: shown_token(tokenizer, token_id)


__all__ = ["AnalyzeOptions", "analyze"]
