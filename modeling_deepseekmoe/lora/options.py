# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The options of `peft.LoraConfig` on stacked experts: each is honoured, or refused by name.

PEFT applies some options to modules alone, and passes by parameters, which the experts are. Options that choose where
adapters go are applied here to the names that the config gets. PEFT would ignore other options on parameters, or
refuse them when half of the model is wrapped. These are refused here, before. The table is in docs/lora.md.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig

from ..checkpoint_layout import layer_of
from ..support.peft_support import adapts_module, get_pattern_key, variant_fields

# Other computations than x A B: no expert has them, and neither `merge` nor `export-adapter` takes such an adapter.
OTHER_COMPUTATIONS = {
    "use_dora": "its magnitudes need the norms of every expert's merged weight in every step, and plain PEFT could "
    "not read the adapter. Use use_rslora, or a higher rank",
    "use_qalora": "only PEFT's layers for GPTQ weights know it",
    "lora_bias": "one bias for all experts could not be merged into any",
    "fan_in_fan_out": "no weight here is stored as (in, out)",
    "alora_invocation_tokens": "the experts see no positions",
    "use_bdlora": "the experts have no such variant",
    "arrow_config": "the experts have no such variant",
    "monteclora_config": "the experts have no such variant",
    "velora_config": "the experts have no such variant",
    "kasa_config": "it would change the base's weights",
}
_REFUSED = {
    **OTHER_COMPUTATIONS,
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config"),
        "it serves a way to begin (init_lora_weights) that the experts do not have",
    ),
    "loftq_config": "it would begin with what rounding took. correct_rounding gives that back beside the adapter",
    "megatron_config": "there are no layers of Megatron here",
    "target_parameters": "name experts by `projections` and `experts`, everything else by `target_modules`",
}
# The options that choose places beside the names themselves.
PLACES = ("layers_to_transform", "layers_pattern", "exclude_modules")
_STARTS = (True, False, "gaussian")
_BIASES = ("none", "all")


def check_dropout(lora_dropout: Any) -> None:
    """Raise a `ValueError` if `lora_dropout` is no probability below 1."""
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout={lora_dropout!r} is not allowed: it must be at least 0 and below 1.")


def check_options(init_lora_weights: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect on experts, or another one than their names say.

    Args:
        init_lora_weights: the field of that name.
        options: further fields of `peft.LoraConfig`; those that are empty count as absent.

    Raises:
        ValueError: for such an option. The message names the field, the value and why it is not allowed.
    """
    if not any(init_lora_weights is start or init_lora_weights == start == "gaussian" for start in _STARTS):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} is not allowed: it must be True, False or 'gaussian'."
        )
    for name, value in options.items():
        if value and (name in _REFUSED or name in variant_fields()):
            raise ValueError(f"{name}={value!r} is not allowed: {_REFUSED.get(name, 'it is not known on experts')}.")
    if options.get("bias", "none") not in _BIASES:
        raise ValueError(
            f"bias={options['bias']!r} is not allowed: it must be 'none' or 'all'. Experts have no biases."
        )
    if str(options.get("peft_type") or "LORA") not in ("LORA", "PeftType.LORA"):
        raise ValueError(f"peft_type={options['peft_type']!r} is not allowed: it must be 'LORA'.")


def chosen_parameters(names: Iterable[str], options: Mapping[str, Any]) -> list[str]:
    """Return the parameters that `layers_to_transform`, `layers_pattern` and `exclude_modules` leave.

    The fields mean for parameters what PEFT takes them to mean for modules.

    Args:
        names: full names of parameters, `model.layers.1.mlp.experts.down_proj`.
        options: fields of `peft.LoraConfig`.
    """
    given, kept = {name: options.get(name) for name in PLACES}, []
    if all(value is None for value in given.values()):
        return list(names)
    for name in names:
        module = name.rpartition(".")[0]
        config = LoraConfig(target_modules=[module.rpartition(".")[2]], **given)  # a whole name goes by no layers
        if adapts_module(config, module) and not excludes(given["exclude_modules"], name):
            kept.append(name)
    return kept


def excludes(exclude_modules: Any, name: str) -> bool:
    """Tell whether a module or a parameter is excluded by its own name."""
    return bool(exclude_modules) and not adapts_module(
        LoraConfig(target_modules=[name], exclude_modules=exclude_modules), name
    )


def completed_pattern(
    field: str, pattern: Mapping[str, Any] | None, parameters: Iterable[str], modules: Iterable[str]
) -> dict[str, Any]:
    """Complete a `rank_pattern` or `alpha_pattern`: its keys also match the parameters of the modules that they name.

    PEFT matches keys with the ends of whole names. `mlp.experts` alone would match nothing, and be ignored.

    Args:
        field: the name of the field.
        pattern: keys, which are regular expressions, and their values.
        parameters: full names of the adapted parameters.
        modules: full names of the adapted modules.

    Raises:
        ValueError: for a key that matches nothing that is adapted.
    """
    parameters, modules = list(parameters), list(modules)
    result: dict[str, Any] = {}
    for key, value in (pattern or {}).items():
        longer = rf"({key})\.(weight|gate_up_proj|down_proj)"
        direct = any(_matches(key, name) for name in (*parameters, *modules))
        inside = any(_matches(longer, name) for name in parameters)
        if not direct and not inside:
            raise ValueError(
                f"{field}: {key!r} is not allowed: nothing that is adapted has a name that ends so. There are "
                f"{', '.join(sorted({re.sub(r'[.][0-9]+[.]', '.*.', name) for name in (*parameters, *modules)}))}."
            )
        result |= ({key: value} if direct else {}) | ({longer: value} if inside else {})
    return result


def _matches(key: str, name: str) -> bool:
    return get_pattern_key([key], name) == key


def check_layers(layers_to_transform: Any, names: Iterable[str]) -> None:
    """Refuse a `layers_to_transform` that names no layer, or one that is not there.

    Raises:
        ValueError: for such a field. The message names its value.
    """
    if layers_to_transform is None:
        return
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    there = {layer for name in names if (layer := layer_of(name)) is not None}
    if not wanted or not there.issuperset(wanted):
        raise ValueError(
            f"layers_to_transform={layers_to_transform!r} is not allowed: the layers are {min(there)} to {max(there)}."
        )


def check_exclusions(exclude_modules: Any, modules: Iterable[str], parameters: Iterable[str]) -> None:
    """Refuse names in `exclude_modules` that nothing in the model has, and regular expressions that are not valid.

    Args:
        exclude_modules: the field.
        modules, parameters: full names.

    Raises:
        ValueError: for such an entry. The message names the field and the value.
    """
    names = [*modules, *parameters]
    each = [exclude_modules] if isinstance(exclude_modules, str) else [[name] for name in exclude_modules or ()]
    try:
        idle = [entry for entry in each if not any(excludes(entry, name) for name in names if name)]
    except re.error as error:
        raise ValueError(f"exclude_modules={exclude_modules!r} is not allowed: {error}.") from error
    if idle:
        raise ValueError(f"exclude_modules: {idle[0]!r} is not allowed: nothing in the model has that name.")


def check_copies(modules: Iterable[str], copies: Iterable[str], adapted: Iterable[str]) -> None:
    """Refuse `modules_to_save` that name nothing, or something inside which adapters are wanted.

    Args:
        modules: full names of all modules.
        copies: the field.
        adapted: full names of what is to be adapted.

    Raises:
        ValueError: for such an entry. The message names it.
    """
    names, adapted = list(modules), list(adapted)
    for copy in copies:
        found = [name for name in names if name.endswith(copy)]
        if not found:
            raise ValueError(f"modules_to_save: {copy!r} is not allowed: no module of the model has that name.")
        inside = next((name for name in adapted for module in found if f"{name}.".startswith(f"{module}.")), None)
        if inside is not None:
            raise ValueError(
                f"modules_to_save: {copy!r} is not allowed: a whole copy of it would be trained, and {inside}, which "
                "lies in it, is adapted. Leave one of them out."
            )


__all__ = [
    "OTHER_COMPUTATIONS",
    "PLACES",
    "check_copies",
    "check_dropout",
    "check_exclusions",
    "check_layers",
    "check_options",
    "chosen_parameters",
    "completed_pattern",
    "excludes",
]
