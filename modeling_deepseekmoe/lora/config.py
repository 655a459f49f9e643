# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Configs of LoRA on the routed experts, for `peft.get_peft_model`.

They serve this family and every model of transformers with the same stacked experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers.utils import logging

from ..checkpoint_layout import PROJECTIONS
from ..esft.selection import ExpertSelection
from ..experts import why_unsupported
from ..families.linear_maps import gate_names, linear_names, odd_linears
from ..families.moe_layers import find_experts, find_moe_layers
from ..support.models import is_sharded
from ..support.peft_support import use_own_layers
from .layer import create_layer
from .options import (
    PLACES,
    check_copies,
    check_dropout,
    check_exclusions,
    check_layers,
    check_options,
    chosen_parameters,
    completed_pattern,
    excludes,
)

logger = logging.get_logger(__name__)


@dataclass
class ExpertLoraConfig(LoraConfig):
    """A `peft.LoraConfig` whose adapters on stacked experts are computed directly.

    It is saved as a plain LoraConfig that plain PEFT reads. Plain PEFT refuses dropout on parameters, so that
    `lora_dropout` is saved as 0.

    Attributes:
        experts: for every layer the ids of the experts that get an adapter; all experts if `None`. In the saved
            adapter the factors of all others are zero.
    """

    experts: dict[int, list[int]] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        use_own_layers(self, create_layer)

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved: the fields of a LoraConfig."""
        fields = super().to_dict()
        del fields["experts"]
        if self.target_parameters and self.lora_dropout:
            logger.warning_once(
                f"lora_dropout={self.lora_dropout} is saved as 0, since plain PEFT refuses it for experts: to train a "
                f"loaded adapter on, call optimize_expert_lora(model, lora_dropout={self.lora_dropout})."
            )
            fields["lora_dropout"] = 0.0
        return fields


_PARAMETERS = {"gate_up": "gate_up_proj", "down": "down_proj"}


def expert_lora_config(
    model: nn.Module,
    r: int = 16,
    lora_alpha: float | None = None,
    *,
    experts: str | Path | Mapping[int, Sequence[int]] | ExpertSelection | None = None,
    projections: Sequence[str] = ("gate_up", "down"),
    train_router: bool = False,
    target_modules: str | Sequence[str] = (),
    **options: Any,
) -> ExpertLoraConfig:
    """Make a config for `peft.get_peft_model` that adapts the routed experts.

    Args:
        model: a model of this family, or any other of transformers with experts stacked as `gate_up_proj` (E, 2I, D)
            and `down_proj` (E, D, I): its DeepSeek-V2 and V3, Qwen3-MoE, Mixtral, OLMoE, ...
        r: rank of every expert's adapter.
        lora_alpha: the adapter counts `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`; 2 * r by default.
        experts: restrict the adapter to these ids of these layers, or to those of an `esft.json`. Layers that are not
            named get none.
        projections: `"gate_up"` (one A serves both halves), `"down"`, or both.
        train_router: train the gates too, as whole copies. Their balancing bias is saved with the adapter.
        target_modules: linear maps to adapt beside the experts, by the end of their names or by the name of a module
            that holds them: `("self_attn", "shared_experts")`, `("q_proj", "v_proj")`; `"all-linear"` for all of them
            but the head and the gates.
        options: other fields of `peft.LoraConfig`, which hold for experts too: `lora_dropout` (drawn for every token
            at every expert), `use_rslora`, `init_lora_weights` (`True`, `False` or `"gaussian"`), `modules_to_save`,
            `task_type` (`"CAUSAL_LM"` by default), `layers_to_transform`, `exclude_modules`, `rank_pattern`,
            `alpha_pattern`, `trainable_token_indices`, ... docs/lora.md lists all of them.

    Raises:
        ValueError: for a value or an option that is not allowed, or a model without such experts.
    """
    projections, options = _as_list(projections), {**_DEFAULTS, **options}
    lora_alpha = _checked_alpha(r, lora_alpha)
    _check_numbers(options["lora_dropout"], projections)
    own = {name: value for name, value in options.items() if name not in _DEFAULTS}
    check_options(options["init_lora_weights"], own)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks = _supported_experts(model)
    selection = None if experts is None else ExpertSelection.of(experts).checked(model)
    places = _Places.of(model, blocks, selection, projections, _as_list(target_modules))
    copies = [*_as_list(options.pop("modules_to_save")), *(_gates(model, places.blocks) if train_router else [])]
    _refuse_sharded_copies(model, [*copies, *_embeddings(own.get("trainable_token_indices"))])
    places.check(model, own, copies)
    adapted, others = places.chosen(own), chosen_parameters(places.ffns, own)
    if not any(excludes(own.get("exclude_modules"), name) for name in places.linear):
        options["exclude_modules"] = None  # done, and PEFT, which looks at modules alone, would say that it was not
    for name in ("rank_pattern", "alpha_pattern"):
        options[name] = completed_pattern(name, own.get(name), [*adapted, *others], places.linear)
    return ExpertLoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=places.targets(own),
        target_parameters=_shortened(places.ends(), adapted) + _shortened(places.weights, others),
        modules_to_save=copies or None,
        experts=None if selection is None else selection.experts,
        **options,
    )


# Of the options, beside those that PEFT has.
_DEFAULTS: dict[str, Any] = {
    "lora_dropout": 0.0,
    "use_rslora": False,
    "init_lora_weights": True,
    "modules_to_save": (),
    "task_type": "CAUSAL_LM",
}


def _checked_alpha(r: Any, lora_alpha: Any) -> float:
    """Return `lora_alpha`, which is 2 * r by default, after a check of both."""
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r!r} is not allowed: it must be an integer of at least 1.")
    lora_alpha = 2 * r if lora_alpha is None else lora_alpha
    if not lora_alpha > 0:
        raise ValueError(f"lora_alpha={lora_alpha!r} is not allowed: it must be above 0.")
    return lora_alpha


def _check_numbers(lora_dropout: Any, projections: list[str]) -> None:
    check_dropout(lora_dropout)
    unknown = [name for name in projections if name not in _PARAMETERS]
    if unknown or not projections:
        raise ValueError(f"projections={projections!r} is not allowed: choose from 'gate_up' and 'down'.")


@dataclass(frozen=True)
class _Places:
    """The parts of a model that get adapters.

    Attributes:
        blocks: the experts of every layer, by name and module.
        experts_of: the layer of every parameter of experts, by its full name.
        layers: the layers that are selected; `None` for all.
        modules, weights: what `target_modules` means for PEFT's `target_modules` and `target_parameters`. Each maps
            ends of names to the full names that have them.
    """

    blocks: dict[int, tuple[str, nn.Module]]
    experts_of: dict[str, int]
    layers: list[int] | None
    modules: dict[str, list[str]]
    weights: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        blocks: dict[int, tuple[str, nn.Module]],
        selection: ExpertSelection | None,
        projections: list[str],
        targets: list[str],
    ) -> "_Places":
        stacks = [_PARAMETERS[name] for name in dict.fromkeys(projections)]
        experts_of = {f"{name}.{stack}": layer for layer, (name, _) in blocks.items() for stack in stacks}
        layers = None if selection is None else [layer for layer, ids in selection.experts.items() if ids]
        if selection is not None:
            if selection.non_expert_modules:
                raise ValueError(
                    "experts: non_expert_modules=True is not allowed for LoRA: name them in target_modules."
                )
            if selection.shared_experts:  # Qwen2-MoE has one
                one = any(".shared_expert." in name for name, _ in model.named_modules())
                targets = [*targets, "shared_expert" if one else "shared_experts"]
        return cls(blocks, experts_of, layers, *_linear_targets(model, targets))

    @property
    def wanted(self) -> list[str]:
        """Parameters of experts in the selected layers."""
        return [name for name, layer in self.experts_of.items() if self.layers is None or layer in self.layers]

    def targets(self, options: Mapping[str, Any]) -> list[str]:
        """Return what PEFT is to look for. A full name is adapted whatever the layers: others are left out here."""
        layers = {name: options.get(name) for name in ("layers_to_transform", "layers_pattern")}
        return [
            end
            for end, names in self.modules.items()
            if names != [end] or chosen_parameters([f"{end}.weight"], layers)
        ]

    @property
    def linear(self) -> list[str]:
        """Full names of the linear maps that are adapted as modules."""
        return [name for names in self.modules.values() for name in names]

    @property
    def ffns(self) -> list[str]:
        """Full names of the weights that are adapted as parameters."""
        return [name for names in self.weights.values() for name in names]

    def ends(self) -> dict[str, list[str]]:
        """Group the parameters of experts by the ends of their names."""
        ends: dict[str, list[str]] = {}
        for name in sorted(self.experts_of, key=lambda name: name.rsplit(".", 1)[0]):
            ends.setdefault(".".join(name.split(".")[-3:]), []).append(name)
        return ends

    def check(self, model: nn.Module, options: Mapping[str, Any], copies: list[str]) -> None:
        """Raise a `ValueError` if options name what is not there, or copies of what is adapted."""
        names = [name for name, _ in model.named_modules()]
        check_copies(names, copies, [*self.wanted, *self.linear, *self.ffns])
        check_layers(options.get("layers_to_transform"), names)
        check_exclusions(options.get("exclude_modules"), names, self.experts_of)

    def chosen(self, options: Mapping[str, Any]) -> list[str]:
        """Return the parameters of experts that are adapted.

        Raises:
            ValueError: if none is left, or if an option excludes selected ones.
        """
        wanted = self.wanted
        adapted = chosen_parameters(wanted, options)
        if adapted and (self.layers is None or adapted == wanted):
            return adapted
        given = {name: options[name] for name in PLACES if options.get(name) is not None}
        lost = next(name for name in wanted if name not in adapted)
        what = f"no layer of {sorted(self.blocks)} is left." if self.layers is None else (
            "`experts` selects some of these experts."
        )  # fmt: skip
        raise ValueError(f"{given} is not allowed: it excludes {lost}, and {what}")


def _shortened(ends: dict[str, list[str]], names: list[str]) -> list[str]:
    """Shorten names to their ends, if all names that have these ends are there.

    Plain PEFT wants the same targets of all adapters.
    """
    return list(ends) if all(name in names for own in ends.values() for name in own) else names


def _embeddings(trainable_token_indices: Any) -> list[str]:
    """Return the modules of which PEFT trains some rows."""
    if not trainable_token_indices:
        return []
    return [*trainable_token_indices] if isinstance(trainable_token_indices, Mapping) else ["embed_tokens"]


def _refuse_sharded_copies(model: nn.Module, names: Sequence[str]) -> None:
    for name, module in model.named_modules():
        is_copied = any(f".{name}".endswith(f".{wanted}") for wanted in names)
        if is_copied and is_sharded(module):
            raise ValueError(
                f"{name} is not allowed as a trained copy (modules_to_save, train_router): it is sharded."
            )


def _supported_experts(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    blocks = find_experts(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no stacked experts: there is nothing for expert LoRA to adapt.")
    for name, experts in blocks.values():
        check_supported(name, experts)
    return blocks


def _gates(model: nn.Module, blocks: dict[int, tuple[str, nn.Module]]) -> list[str]:
    layers = [layer for layer in find_moe_layers(model) if layer.index in blocks]
    missing = [layer.name for layer in layers if layer.gate is None]
    if missing:
        raise ValueError(f"train_router=True is not allowed for {type(model).__name__}: {missing[0]} has no gate.")
    names = [layer.gate_path for layer in layers]
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def check_supported(name: str, experts: nn.Module) -> None:
    reason = why_unsupported(experts)
    if reason is not None:
        raise ValueError(f"{name} ({type(experts).__name__}) is not allowed for expert LoRA: {reason}.")


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _linear_targets(model: nn.Module, targets: list[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Translate `target_modules` for PEFT's `target_modules` and `target_parameters`.

    Each of the two results maps ends of names to the full names that have them.
    """
    linears, odd, gates = linear_names(model), odd_linears(model), gate_names(model)
    modules: dict[str, list[str]] = {}
    parameters: dict[str, list[str]] = {}
    for target in targets:
        if target == "all-linear":
            found = {name: name for name in linears if name.rsplit(".", 1)[-1] not in ("lm_head", "score")}
            found = {name: name for name in found if not f"{name}.".startswith(gates)}
        else:
            padded = {name: f".{name}." for name in linears if f".{target}." in f".{name}."}
            found = {name: text[text.rindex(f".{target}.") + 1 : -1] for name, text in padded.items()}
        if not found:
            leaves = sorted({name.rsplit(".", 1)[-1] for name in linears if name not in odd})
            raise ValueError(
                f"target_modules: {target!r} is not allowed: no linear map has that name. There are "
                f"{', '.join(leaves)}, and 'all-linear'; train_router=True trains the gates."
            )
        found = _without_odd_ones(target, found, odd)
        for name, end in found.items():
            # PEFT takes these, wherever they stand in a V2 or V3 model, for the old names of the routed experts.
            if end.endswith(PROJECTIONS):
                parameters.setdefault(f"{end}.weight", []).append(f"{name}.weight")
            else:
                modules.setdefault(end, []).append(name)
    return modules, parameters


def _without_odd_ones(target: str, found: dict[str, str], odd: dict[str, str]) -> dict[str, str]:
    """Leave out the maps that an adapter would be of no use to, or would break.

    Args:
        target: what the user has named.
        found: the full names of the linear maps that it means, and the ends that PEFT is to look for.
        odd: the names of such maps in the model, and what they are.

    Raises:
        ValueError: if there are no others.
    """
    left_out = [name for name in found if name in odd]
    if not left_out:
        return found
    first = f"{left_out[0]} ({odd[left_out[0]]})"
    if len(left_out) == len(found):
        raise ValueError(f"target_modules: {target!r} is not allowed: it names {first} alone.")
    logger.warning_once(f"target_modules: {target!r} leaves some linear maps out ({len(left_out)}), as {first}.")
    kept = {name: end for name, end in found.items() if name not in odd}
    # PEFT adapts whatever has such an end.
    ambiguous = any(f".{name}".endswith(f".{end}") for name in left_out for end in kept.values())
    return {name: name for name in kept} if ambiguous else kept


__all__ = ["ExpertLoraConfig", "expert_lora_config"]
