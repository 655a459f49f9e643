# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a checkpoint: check everything, say what fits, train or go on, measure, save, and say what comes next."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed

from modeling_deepseekmoe.configuration import read_config_file

from ..analysis.evaluation import traced_layers
from ..analysis.meta_models import meta_model, read_config
from ..balancing.gates import find_biased_gates
from ..esft.selection import ExpertSelection
from ..hub.card import CARD_NAME, metadata_of
from ..lora.config import expert_lora_config
from ..quantization.correction import check_originals, correct_rounding, load_correction, save_correction
from ..support.folders import local_folder
from ..support.tokenization import load_tokenizer
from .build import calibration_batches, default_targets, load_model, lora_settings, make_trainer, select_by_data
from .data import TrainingData, load_data, make_data
from .fitting import Machine, MethodPlan, choose_dtype, fitting_table, plan_methods, this_machine
from .options import ADAPTERS, LEARNING_RATES, FinetuneOptions
from .progress import ProgressLines
from .results import (
    has_plots,
    measure_perplexity,
    next_commands,
    read_measures,
    report_routing,
    save_trained,
    size_of,
    summary,
    trained_parameters,
    write_measures,
)
from .state import AFTER, BEFORE, CORRECTION, RESULT, SELECTION, RunFolder, write_whole

Echo = Callable[[str], None]


class FinetuneError(RuntimeError):
    """A run cannot begin, because it does not fit this machine. The message says what would."""


@dataclass(frozen=True)
class PreparedRun:
    """A run of which everything is decided and checked, and nothing written.

    Attributes:
        options: the options, with nothing left to be decided.
        config: config of the model.
        tokenizer: the model's tokenizer.
        data: what is trained and evaluated on.
        machine: where.
        parameters: of the model, whatever is trained.
    """

    options: FinetuneOptions
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    machine: Machine
    parameters: int


def require_libraries() -> None:
    """Raise ImportError, with the line that helps, if a library of the extra `train` is missing."""
    missing = [name for name in ("trl", "datasets") if find_spec(name) is None]
    if missing:
        raise ImportError(f"Fine-tuning needs {' and '.join(missing)}: pip install 'modeling-deepseekmoe[train]'")


def prepare(
    options: FinetuneOptions, *, force: bool = False, overwrite: bool = False, echo: Echo = print
) -> PreparedRun:
    """Check the data, the tokenizer and what fits, and decide what the options leave open. Nothing is written.

    Args:
        options: what is trained, on what, and how.
        force: go on where the plan says that it does not fit.
        overwrite: allow an output that holds a run.
        echo: shows a line.

    Raises:
        ValueError, OSError, ImportError: for a mistake in the options, the data or the model.
        FinetuneError: if it does not fit this machine.
    """
    options.check()
    require_libraries()
    machine = this_machine()
    options = RunFolder(Path(options.output)).check(options, overwrite)
    rows = load_data(options)
    folder = local_folder(options.model, weights=False)
    _refuse_quantised(folder, options.method)
    config = read_config(folder)
    tokenizer = load_tokenizer(options.tokenizer or folder, trust_remote_code=options.trust_remote_code)
    context = config.get_text_config().max_position_embeddings
    data = make_data(rows, options, tokenizer, context)
    _check_vocabulary(data, config.get_text_config().vocab_size)
    if not overwrite:
        RunFolder(Path(options.output)).check_data(data.digest)
    for line in data.lines:
        echo(line)
    options = _decided(options, config, data, machine)
    plans = plan_methods(config, options, machine, _planned_length(options, data))
    echo(fitting_table(plans, machine, options.method))
    plan = next(plan for plan in plans if plan.method == options.method)
    _require_fit(plan, plans, machine, force, echo)
    options, parameters = replace(options, recompute=plan.recompute), plan.plan.parameters if plan.plan else 0
    return PreparedRun(options, config, tokenizer, data, machine, parameters)


def _planned_length(options: FinetuneOptions, data: TrainingData) -> int:
    return data.max_length if options.packing else data.longest


def _refuse_quantised(folder: Path, method: str) -> None:
    """Raise ValueError if the weights are quantised, and the method trains those that are not."""
    if method != "qlora" and "quantization_config" in read_config_file(folder):
        raise ValueError(
            f"method={method!r} is not allowed for {folder}: its weights are quantised. Convert it first (deepseekmoe "
            "convert --dtype bfloat16), or choose qlora."
        )


def _check_vocabulary(data: TrainingData, size: int) -> None:
    largest = max(max(example.ids) for example in (*data.train, *data.evaluation))
    if largest >= size:
        raise ValueError(
            f"tokenizer: it gives token {largest}, and the model has vocab_size={size}: it is another model's."
        )


def _decided(
    options: FinetuneOptions, config: PreTrainedConfig, data: TrainingData, machine: Machine
) -> FinetuneOptions:
    """Decide everything but whether activations are recomputed, and check the method against the model's shapes."""
    shapes, targets = meta_model(config), options.target_modules
    traced_layers(shapes)
    _check_balance_rate(options, shapes)
    if options.method in ADAPTERS and targets is None:
        targets = default_targets(shapes)
    options = replace(
        options,
        loss_on=data.loss_on,
        max_length=data.max_length,
        learning_rate=options.learning_rate or LEARNING_RATES[options.method],
        dtype=choose_dtype(options, machine),
        target_modules=targets,
    )
    if options.correction_rank is not None and Path(options.model).is_dir():  # else nothing is downloaded yet
        check_originals(shapes, options.model, options.format)
    if options.method in ADAPTERS:
        expert_lora_config(shapes, **lora_settings(options))  # its errors, before anything is loaded
    return options


def _check_balance_rate(options: FinetuneOptions, shapes: Any) -> None:
    """Raise ValueError if a rate of updates is given for a model whose gates have no bias."""
    if options.balance_rate == FinetuneOptions.balance_rate or find_biased_gates(shapes):
        return
    if not getattr(shapes.config, "added_balancing_bias", False):
        raise ValueError(
            f"balance_rate={options.balance_rate!r} is not allowed for {options.model}: its gates have no balancing "
            "bias. Balance them with router_aux_loss_coef."
        )


def _require_fit(plan: MethodPlan, plans: Sequence[MethodPlan], machine: Machine, force: bool, echo: Echo) -> None:
    """Raise FinetuneError if the plan does not fit, unless the user insists."""
    if plan.fits:
        return
    others = [one.method for one in plans if one.fits]
    advice = f"method={' or '.join(others)} fits" if others else "a smaller batch_size, max_length or rank needs less"
    if not force:
        raise FinetuneError(f"method={plan.method!r} does not fit: {machine}. {advice}; force tries it all the same.")
    echo(f"method={plan.method} does not fit, and is tried all the same")


def finetune(
    options: FinetuneOptions, *, force: bool = False, overwrite: bool = False, echo: Echo = print
) -> dict[str, Any]:
    """Fine-tune a checkpoint, or go on with a run that was interrupted.

    The folder of the output then holds what was trained (`adapter`, `experts` or `model`), the measures and routing
    reports `before` and `after`, the options (`finetune.yaml`) and the result (`result.json`). A run that was
    interrupted goes on from its last checkpoint when it is called with the same options, and ends with the same
    weights.

    Args:
        options: what is trained, on what, and how.
        force: train where the plan says that it does not fit.
        overwrite: begin anew where a run is already, and remove what it has written.
        echo: shows a line.

    Returns:
        The content of `result.json`.

    Raises:
        ValueError, OSError, ImportError: for a mistake in the options, the data or the model. Nothing is written then.
        FinetuneError: if it does not fit this machine. Nothing is written then.
    """
    run = prepare(options, force=force, overwrite=overwrite, echo=echo)
    options, folder, started = run.options, RunFolder(Path(run.options.output)), time.monotonic()
    model = load_model(options, run.machine)
    selection = _selection(model, run, folder, overwrite, force, echo)
    if options.correction_rank is not None:
        _correct(model, run, folder, overwrite, echo)
    for line in folder.begin(options, run.data.digest, overwrite=overwrite):
        echo(f"not as it was when the run began, so that the last bits may differ: {line}")
    folder.remove_rests()
    if selection is not None:
        selection.save(folder / SELECTION)
    if options.correction_rank is not None and not (folder / CORRECTION).is_file():
        save_correction(model, folder / CORRECTION)
    kept = _config_values(model)
    with folder.undone_by_errors():
        trainer = make_trainer(
            model, run.data, run.tokenizer, options, run.machine, selection=selection, callbacks=[ProgressLines(echo)]
        )
    trained = trained_parameters(trainer.model)
    where = f", on the experts, {', '.join(options.target_modules or ())}" if options.method in ADAPTERS else ""
    echo(f"{options.method}: {trained:,} parameters are trained{where}; the model has {run.parameters:,}")
    if not has_plots():
        echo("the routing reports are numbers without pages: those need the extra `report`")
    if not (folder / BEFORE).is_dir():
        _measure(trainer, run, folder / BEFORE, "before the training", echo)
    set_seed(options.seed)  # the same numbers, whatever was measured in this process
    trainer.train(resume_from_checkpoint=folder.checkpoint)
    model.config.get_text_config().__dict__.update(kept)
    path, size = save_trained(trainer, run.tokenizer, options, folder)
    _measure(trainer, run, folder / AFTER, "after the training", echo)
    result = _finish(trainer, run, folder, (path, size, trained), echo)
    echo(f"this session: {time.monotonic() - started:.0f} s")
    return result


def _selection(
    model: Any, run: PreparedRun, folder: RunFolder, overwrite: bool, force: bool, echo: Echo
) -> ExpertSelection | None:
    """Select experts, or take those of the run that was interrupted. Plan again, now that their number is known."""
    if run.options.method != "esft":
        return None
    if (folder / SELECTION).is_file() and not overwrite:
        return ExpertSelection.of(folder / SELECTION)
    echo("scoring the experts on the rows to train on ...")
    selection = select_by_data(model, run.data.train, run.options)
    selected = sum(map(len, selection.experts.values()))
    total = sum(layer.num_experts for layer in traced_layers(model))
    echo(f"{selected} of {total} experts are selected, {selected / total:.1%}")
    plans = plan_methods(
        run.config, run.options, run.machine, _planned_length(run.options, run.data), esft_share=selected / total
    )
    _require_fit(next(plan for plan in plans if plan.method == "esft"), plans, run.machine, force, echo)
    return selection


def _correct(model: Any, run: PreparedRun, folder: RunFolder, overwrite: bool, echo: Echo) -> None:
    """Give back what rounding took, or what it took of the run that was interrupted."""
    if (folder / CORRECTION).is_file() and not overwrite:
        load_correction(model, folder / CORRECTION)
        return
    echo("working out what rounding took from the experts ...")
    batches = calibration_batches(run.data.train, run.options.seed)
    correct_rounding(model, run.options.model, batches, r=run.options.correction_rank or 0)


def _config_values(model: Any) -> dict[str, Any]:
    """Return what TRL changes in a config, and must not be saved."""
    config = model.config.get_text_config()
    names = ("output_router_logits", "router_aux_loss_coef", "pad_token_id", "use_cache")
    return {name: vars(config)[name] for name in names if name in vars(config)}


def _measure(trainer: Any, run: PreparedRun, folder: Path, when: str, echo: Echo) -> None:
    """Write perplexity and routing report of the model as it is."""
    echo(f"measuring {when} ...")
    base = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    title = f"{run.options.model}, {when}"
    report = report_routing(base, run.tokenizer, run.data.measured, title, run.options.report_tokens)
    write_measures(folder, measure_perplexity(trainer, run.data.measured), report)


def _finish(
    trainer: Any, run: PreparedRun, folder: RunFolder, saved: tuple[Path, int, int], echo: Echo
) -> dict[str, Any]:
    """Write the result, say it, and say what comes next."""
    (path, size, trained), options = saved, run.options
    before, after = read_measures(folder / BEFORE), read_measures(folder / AFTER)
    card = local_folder(options.model, weights=False) / CARD_NAME
    license = metadata_of(card.read_text(encoding="utf-8")).get("license") if card.is_file() else None
    commands = next_commands(options, folder, run.config.model_type, license)
    result = {
        "method": options.method,
        "trained": str(path),
        "bytes": size,
        "trained_parameters": trained,
        "steps": trainer.state.global_step,
        "measured_on": "evaluation" if run.data.evaluation else "training",
        "before": before,
        "after": after,
        "next": commands,
    }
    if options.correction_rank is not None:
        result["correction"] = str(folder / CORRECTION)
    write_whole(folder / RESULT, json.dumps(result, indent=2) + "\n")
    if not options.keep_checkpoints:
        folder.remove_checkpoints()
    echo(f"on {len(run.data.measured)} sequences {'held out' if run.data.evaluation else 'that were trained on'}:")
    for line in summary(before, after):
        echo(f"  {line}")
    echo(f"{path}: {size_of(size)}; routing reports in {folder / BEFORE} and {folder / AFTER}")
    if options.correction_rank is not None:
        echo(f"over experts in {options.format} load_correction(base, '{folder / CORRECTION}') comes first")
    echo("next:")
    for command in commands:
        echo(f"  {command}")
    if commands[-1].startswith("deepseekmoe push"):
        echo("  (your own name in place of `you`, the model's license, and without --dry-run, to publish it)")
    return result


__all__ = ["FinetuneError", "PreparedRun", "finetune", "prepare", "require_libraries"]
