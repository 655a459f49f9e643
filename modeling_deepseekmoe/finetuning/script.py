# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Write a run as a Python script: the same data, the same model, TRL's trainer with the same settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis.counted_model import CountedModel
from ..balancing.gates import find_biased_gates
from .build import lora_settings, trainer_settings
from .data import sequences_of
from .options import ADAPTERS, FinetuneOptions
from .run import PreparedRun
from .state import CHECKPOINTS, CORRECTION, SELECTION, TRAINED

_METHODS = {
    "lora": "with LoRA on its experts",
    "qlora": "with LoRA on its quantised experts",
    "esft": "in the experts that the data use",
    "full": "in all its parameters",
}


def make_script(run: PreparedRun) -> str:
    """Write the script of a run. It ends with the same weights as [`finetune`] with the same options.

    Measures and routing reports are not in it.

    Args:
        run: from [`prepare`].
    """
    options = run.options
    updates = options.trains_gates and bool(find_biased_gates(CountedModel.of(run.config).model))
    parts = [_head(options, updates), _data(run), _model(options, run.machine.device)]
    if options.method == "esft":
        parts.append(_selected(options))
    if options.correction_rank is not None:
        parts.append(_corrected(options))
    return "\n".join([*parts, _trainer(run, updates), _end(options)])


def _head(options: FinetuneOptions, updates: bool) -> str:
    names = {"last_complete_checkpoint", "load_tokenizer", "register"}
    names.add("LoadBalancingCallback" if updates else "RouterStatsCallback")
    if options.method in ADAPTERS:
        names.add("expert_lora_config")
    if options.method == "esft":
        names |= {"ExpertSelection", "prepare_esft", "save_esft", "score_experts", "select_experts"}
    if options.method == "qlora":
        names.add("StackedExpertsConfig")
    corrects = options.correction_rank is not None
    if corrects:
        names |= {"correct_rounding", "load_correction", "save_correction"}
    lines = [
        f'"""Fine-tune {options.model} on {Path(options.data).name} {_METHODS[options.method]}.',
        "",
        "Written by `deepseekmoe finetune --write-script`. Run again, it goes on from its last complete checkpoint.",
        '"""',
        "",
        "from pathlib import Path",
        "",
        "import torch",
        *["from peft import get_peft_model"] * (options.method in ADAPTERS),
        "from transformers import AutoModelForCausalLM, set_seed",
        "from trl import SFTConfig, SFTTrainer",
        "",
        "from modeling_deepseekmoe import (",
        *(f"    {name}," for name in sorted(names)),
        ")",
        *["from modeling_deepseekmoe.finetuning.build import calibration_batches"] * corrects,
        "from modeling_deepseekmoe.finetuning.data import as_dataset, order_examples, split_examples",
        "from modeling_deepseekmoe.finetuning.encoding import encode_rows",
        "from modeling_deepseekmoe.finetuning.rows import load_rows",
        "",
        f"OUTPUT = Path({options.output!r})",
        "",
    ]
    return "\n".join(lines)


def _data(run: PreparedRun) -> str:
    options = run.options
    given = {"column": options.column, "split": options.split, "subset": options.subset}
    own = {name: value for name, value in given.items() if value is not None and (name, value) != ("split", "train")}
    encoding = f"tokenizer, loss_on={options.loss_on!r}, max_length={options.max_length}"
    trusts = ", trust_remote_code=True" if options.trust_remote_code else ""
    lines = [
        "# Every row is checked. A label of -100 is not learnt.",
        f"tokenizer = load_tokenizer({options.tokenizer or options.model!r}{trusts})",
        f"rows = load_rows({_arguments([repr(options.data)], own)})",
    ]
    if options.eval_data is None:
        lines += [
            f"examples = encode_rows(rows, {encoding}).examples",
            f"train, evaluation = split_examples(examples, share={options.eval_share}, seed={options.seed})",
        ]
    else:
        lines += [
            f"train = encode_rows(rows, {encoding}).examples",
            f"evaluation = encode_rows(load_rows({_arguments([repr(options.eval_data)], own)}), {encoding}).examples",
        ]
    if not options.packing:
        number = sequences_of(options, run.data.train)
        order = f"number={number}, batch_size={options.batch_size}, seed={options.seed}"
        lines.append(f"ordered = order_examples(train, {order})  # of all passes, batches of similar length")
    return "\n".join([*lines, ""])


def _model(options: FinetuneOptions, device: str) -> str:
    settings = {"dtype": f"torch.{options.dtype}", "device_map": repr(device)}
    if options.method == "qlora":
        settings["quantization_config"] = f"StackedExpertsConfig(format={options.format!r})"
    arguments = ", ".join([repr(options.model), *(f"{name}={value}" for name, value in settings.items())])
    return "\n".join(
        [
            "register(override_native=True)  # this package's classes for V2 and V3 too",
            f"model = AutoModelForCausalLM.from_pretrained({arguments})",
            "",
        ]
    )


def _selected(options: FinetuneOptions) -> str:
    return "\n".join(
        [
            f"if (OUTPUT / {SELECTION!r}).is_file():",
            f"    selection = ExpertSelection.of(OUTPUT / {SELECTION!r})",
            "else:",
            "    batches = (torch.tensor([example.ids]) for example in train)",
            f"    scores = score_experts(model, batches, {options.score!r}, max_tokens={options.score_tokens})",
            f"    selection = ExpertSelection(select_experts(scores, {options.threshold}))",
            "    OUTPUT.mkdir(parents=True, exist_ok=True)",
            f"    selection.save(OUTPUT / {SELECTION!r})",
            "prepare_esft(model, selection)",
            "",
        ]
    )


def _corrected(options: FinetuneOptions) -> str:
    return "\n".join(
        [
            f"if (OUTPUT / {CORRECTION!r}).is_file():",
            f"    load_correction(model, OUTPUT / {CORRECTION!r})",
            "else:",
            f"    batches = calibration_batches(train, {options.seed})",
            f"    correct_rounding(model, {options.model!r}, batches, r={options.correction_rank})",
            "    OUTPUT.mkdir(parents=True, exist_ok=True)",
            f"    save_correction(model, OUTPUT / {CORRECTION!r})",
            "",
        ]
    )


def _trainer(run: PreparedRun, updates: bool) -> str:
    options = run.options
    settings = trainer_settings(options, run.machine, bool(run.data.evaluation))
    del settings["output_dir"], settings["disable_tqdm"]  # the script has its own, and shows a bar
    lines = []
    if options.method in ADAPTERS:
        lines += [
            f"set_seed({options.seed})  # factors begin with random numbers",
            f"config = expert_lora_config({_arguments(['model'], lora_settings(options))})",
            "adapted = get_peft_model(model, config)",
        ]
    if options.method == "qlora":
        lines.append("model.is_loaded_in_4bit = False  # or TRL would round the adapters to bfloat16")
    lines += [
        "arguments = SFTConfig(",
        f"    str(OUTPUT / {CHECKPOINTS!r}),",
        *(f"    {name}={value!r}," for name, value in settings.items()),
        ")",
        "trainer = SFTTrainer(",
        f"    {'adapted' if options.method in ADAPTERS else 'model'},",
        "    arguments,",
        f"    train_dataset=as_dataset({'train' if options.packing else 'ordered'}),",
        "    eval_dataset=as_dataset(evaluation)," if run.data.evaluation else "    eval_dataset=None,",
        "    processing_class=tokenizer,",
    ]
    callback = f"LoadBalancingCallback(update_rate={options.balance_rate})" if updates else "RouterStatsCallback()"
    lines += [
        ")",
        f"{callback}.add_to(trainer)",
        f"set_seed({options.seed})",
        f"trainer.train(resume_from_checkpoint=last_complete_checkpoint(OUTPUT / {CHECKPOINTS!r}))",
        "",
    ]
    return "\n".join(lines)


def _end(options: FinetuneOptions) -> str:
    trained = TRAINED[options.method]
    if options.method == "esft":
        return f"save_esft(model, OUTPUT / {trained!r})\n"
    lines = [f"trainer.model.save_pretrained(OUTPUT / {trained!r})"]
    if options.method == "full":
        lines.append(f"tokenizer.save_pretrained(OUTPUT / {trained!r})")
    return "\n".join([*lines, ""])


def _arguments(first: list[str], named: Mapping[str, Any]) -> str:
    """Write arguments of a call."""
    return ", ".join([*first, *(f"{name}={value!r}" for name, value in named.items())])


__all__ = ["make_script"]
