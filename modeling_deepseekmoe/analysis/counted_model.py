# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""What is counted of a model on the meta device: its parameters, by what they are for.

Shape letters: D hidden, E routed experts, K chosen experts of a token, r rank.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.gate_rules import UnknownGateError, rule_of
from ..families.linear_maps import odd_linears
from ..families.moe_layers import MoeLayer, find_moe_layers
from .meta_models import configs_of_layers, meta_model, token_embedding

# What structure cannot tell: what K, and the FFN of a decoder layer, are called.
_CHOICES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_FFNS = ("mlp", "mlps", "feed_forward", "ffn", "shared_mlp")


class UnknownExpertsError(ValueError):
    """It cannot be told which parameters are routed experts, or how many of them a token uses."""


@dataclass(frozen=True)
class CountedMoeLayer:
    """The numbers of a MoE layer.

    Attributes:
        num_experts: E, the number of routed experts that have parameters.
        choices: K, the most that a token uses of them.
        routed, activated: parameters of the routed experts, and of those that a token uses.
        shared: parameters of the shared experts, without their gate.
        beside: parameters of a dense FFN that computes the same tokens in the same decoder layer.
    """

    num_experts: int
    choices: int
    routed: int
    activated: int
    shared: int
    beside: int


@dataclass(frozen=True)
class CountedModel:
    """What is counted of a model on the meta device.

    Attributes:
        model: the model.
        parameters: all parameters by name. A tied one is there once.
        layers: the MoE layers as [`find_moe_layers`] describes them.
    """

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    layers: tuple[MoeLayer, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "CountedModel":
        """Build the model of a config on the meta device, and find what it consists of.

        Raises:
            ValueError: if it cannot be built, or if it is no language model of one sequence.
        """
        model = meta_model(config)
        counted = cls(model, dict(model.named_parameters()), tuple(find_moe_layers(model)))
        if not counted.decoder_layers:
            layers = getattr(counted.text_config, "num_hidden_layers", None)
            raise ValueError(f"num_hidden_layers={layers} is not allowed: {type(model).__name__} has no layers then.")
        return counted

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config of the language model."""
        return self.model.config.get_text_config()

    @cached_property
    def language_model(self) -> PreTrainedModel:
        """The module that turns token ids into hidden states."""
        decoder = self.model.get_decoder()  # which may be a part of the head
        return decoder if token_embedding(self.model) in set(decoder.modules()) else self.model.base_model

    @cached_property
    def total(self) -> int:
        """All parameters, and the balancing biases that are buffers."""
        known = {id(parameter) for parameter in self.parameters.values()}
        biases = [layer.bias.tensor for layer in self.layers if layer.bias is not None]
        return _count(self.parameters.values()) + sum(bias.numel() for bias in biases if id(bias) not in known)

    @cached_property
    def embedding(self) -> nn.Parameter:
        """The embedding of token ids (V, D)."""
        embedding = token_embedding(self.model)
        assert embedding is not None  # `meta_model` refuses others
        return embedding.weight

    @cached_property
    def head(self) -> dict[str, nn.Parameter]:
        """The parameters of the output head that are not the embedding's; none if it is tied, or if there is none."""
        head = self.model.get_output_embeddings()
        return {} if head is None else self._named(head, without=[self.embedding])

    @cached_property
    def has_tied_head(self) -> bool:
        """Whether the embedding is the output head too."""
        head = self.model.get_output_embeddings()
        return head is not None and any(one is self.embedding for one in head.parameters())

    @cached_property
    def tables(self) -> dict[str, nn.Parameter]:
        """The parameters of the language model of which a token reads rows: its embeddings."""
        found: dict[str, nn.Parameter] = {}
        for module in self.language_model.modules():
            if isinstance(module, nn.Embedding):
                found |= self._named(module)
        return found

    @cached_property
    def of_towers(self) -> dict[str, nn.Parameter]:
        """The parameters beside the language model and its head: of images, of sounds, and of what joins them."""
        if self.text_config is self.model.config:
            return {}
        own = {id(one) for one in (*self.language_model.parameters(), *self.head.values(), self.embedding)}
        return {name: one for name, one in self.parameters.items() if id(one) not in own}

    @cached_property
    def routed(self) -> dict[str, nn.Parameter]:
        """The parameters of the routed experts.

        Raises:
            UnknownExpertsError: if there are experts outside of the MoE layers. The message names the module.
        """
        _refuse_other_experts(self.model, self.layers)
        return {name: one for layer in self.layers for name, one in self._named(layer.experts).items()}

    @cached_property
    def shared(self) -> dict[str, nn.Parameter]:
        """The parameters of the shared experts, without their gate. Errors are those of [`routed`]."""
        _refuse_other_experts(self.model, self.layers)
        modules = [layer.shared_experts for layer in self.layers if layer.shared_experts is not None]
        return {name: one for module in modules for name, one in self._named(module).items()}

    @cached_property
    def moe_layers(self) -> tuple[CountedMoeLayer, ...]:
        """The numbers of the MoE layers, in their order.

        Raises:
            UnknownExpertsError: as [`routed`], or if it cannot be told how many experts a token uses.
        """
        _refuse_other_experts(self.model, self.layers)
        found: dict[Any, int | UnknownGateError] = {}
        return tuple(self._counted(layer, found) for layer in self.layers)

    @property
    def activated(self) -> int:
        """Parameters that one token uses: all but the routed experts that it does not choose.

        Raises:
            UnknownExpertsError: as [`moe_layers`], or if a decoder layer has two MoE blocks.
        """
        _refuse_two_blocks(self.layers)
        return self.total - sum(layer.routed - layer.activated for layer in self.moe_layers)

    @cached_property
    def decoder_layers(self) -> nn.ModuleList | None:
        """The decoder layers: the largest list of modules in the language model."""
        lists = [module for module in self.language_model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=lambda one: _count(one.parameters()), default=None)

    @cached_property
    def units(self) -> dict[str, list[str]]:
        """The names of the parameters of every layer of every tower, by the name of the layer.

        A layer is a module in a list that is in no other list.
        """
        lists = {name for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)}
        found: dict[str, list[str]] = {}
        for name in self.parameters:
            parts = name.split(".")
            length = next((idx for idx in range(1, len(parts)) if ".".join(parts[:idx]) in lists), None)
            if length is not None:
                found.setdefault(".".join(parts[: length + 1]), []).append(name)
        return found

    def ffn_parameters(self) -> float | None:
        """Count the FFN parameters that a token uses in a layer: of a MoE layer, or of a dense model's.

        Where layers differ it is their mean. It is `None` if a layer has no FFN, or one of another name.

        Raises:
            UnknownExpertsError: as [`activated`].
        """
        _refuse_two_blocks(self.layers)
        blocks = {layer.block for layer in self.layers}
        layers = list(self.decoder_layers or ())
        ffns = [_count(_ffns_in(layer)) for layer in layers]
        if not all(
            ffn or any(part in blocks for part in layer.modules()) for ffn, layer in zip(ffns, layers, strict=True)
        ):
            return None
        if self.moe_layers:
            ffns = [layer.activated + layer.shared + layer.beside for layer in self.moe_layers]
        return sum(ffns) / len(ffns) if ffns else None

    def lora_of_experts(self, rank: int) -> int:
        """Count the parameters of a LoRA of a rank on the routed experts alone."""
        stacks = ((layer, one) for layer in self.layers for one in self._named(layer.experts).items())
        return rank * sum(_sides(one, _experts_of(layer)) for layer, (name, one) in stacks if name in self.routed)

    def lora_parameters(self, rank: int) -> int:
        """Count the parameters of a LoRA of a rank: on linear layers, without gates and head, and on every expert.

        What gets no adapter in training either ([`odd_linears`]) is left out.

        A linear layer is a module whose weight is a matrix, and which is no embedding.

        Raises:
            UnknownExpertsError: as [`routed`].
        """
        left_out = {id(one) for layer in self.layers if layer.gate is not None for one in layer.gate.parameters()}
        left_out |= {id(self.embedding), *map(id, self.head.values())}
        left_out |= {id(self.model.get_submodule(name).weight) for name in odd_linears(self.model)}
        sides = 0
        for module in self.model.modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding) or id(weight) in left_out:
                continue
            sides += sum(weight.shape)
            left_out.add(id(weight))  # it may be in two modules
        of_experts = {layer.experts: _experts_of(layer) for layer in self.layers}
        of_experts |= {one: 1 for layer in self.layers if (one := layer.shared_experts) is not None}
        stacks = self.routed | self.shared
        for module, number in of_experts.items():
            for name, one in self._named(module).items():
                if name in stacks and id(one) not in left_out:
                    sides += _sides(one, number)
                    left_out.add(id(one))
        return rank * sides

    def _named(self, module: nn.Module, without: Iterable[nn.Parameter] = ()) -> dict[str, nn.Parameter]:
        wanted = {id(one) for one in module.parameters()} - {id(one) for one in without}
        return {self._names[key]: one for one in module.parameters() if (key := id(one)) in wanted}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(one): name for name, one in self.parameters.items()}

    def _counted(self, layer: MoeLayer, found: dict[Any, int | UnknownGateError]) -> CountedMoeLayer:
        num_experts = _experts_of(layer)
        choices = min(self._choices_of(layer, found), num_experts)
        parameters = list(self._named(layer.experts).items())
        activated = sum(_share_used(name, one, layer, num_experts, choices) for name, one in parameters)
        shared = 0 if layer.shared_experts is None else _count(layer.shared_experts.parameters())
        of_block = {
            id(one) for module in (layer.experts, layer.shared_experts) if module for one in module.parameters()
        }
        decoder_layer = next(
            (one for one in self.decoder_layers or () if any(part is layer.block for part in one.modules())), None
        )
        beside = _ffns_in(decoder_layer, without=of_block) if decoder_layer is not None else ()
        routed = _count(one for _, one in parameters)
        return CountedMoeLayer(num_experts, choices, routed, activated, shared, _count(beside))

    def _choices_of(self, layer: MoeLayer, found: dict[Any, int | UnknownGateError]) -> int:
        """Find K by trying the gate, or where it is written. Gates that are alike are tried once.

        Raises:
            UnknownExpertsError: if it is neither.
        """
        gate = layer.gate
        own = () if gate is None else tuple((name, tuple(one.shape)) for name, one in gate.state_dict().items())
        plain = {} if gate is None else {k: v for k, v in vars(gate).items() if isinstance(v, int | float | str)}
        key = (type(gate), layer.num_experts, own, tuple(sorted(plain.items(), key=repr)))
        if key not in found:
            try:
                found[key] = rule_of(layer).options.top_k
            except UnknownGateError as error:
                found[key] = error
        known = found[key]
        choices = known if isinstance(known, int) else _written_choices(layer, self.text_config, known)
        if not 1 <= choices <= layer.num_experts:
            raise ValueError(
                f"{layer.name}: {choices} experts for each token are not allowed: it must be from 1 to "
                f"{layer.num_experts}."
            )
        return choices


def _written_choices(layer: MoeLayer, config: PreTrainedConfig, error: Exception) -> int:
    for owner in (layer.gate, layer.block):
        if isinstance(written := getattr(owner, "top_k", None), int):
            return written
    layers = configs_of_layers(config)
    for name in _CHOICES:
        written = getattr(layers[layer.index] if layers else config, name, None)
        if isinstance(written, list) and layer.index < len(written):  # one for every layer
            written = written[layer.index]
        if isinstance(written, int):
            return written
    raise UnknownExpertsError(
        f"{layer.name} ({type(layer.block).__name__}): how many experts a token uses stands neither in its gate's "
        f"top_k nor in a field of the config ({', '.join(_CHOICES)}), and the gate could not be tried: {error}"
    ) from error


def _experts_of(layer: MoeLayer) -> int:
    """Return how many experts have parameters. The gate may choose among more: those that do nothing."""
    if isinstance(layer.experts, nn.ModuleList | nn.ModuleDict):
        return len(layer.experts)
    stacks = [one.shape[0] for one in layer.experts.parameters() if one.ndim == 3]
    written = getattr(layer.experts, "num_experts", None)
    return min(stacks) if stacks else written if isinstance(written, int) else layer.num_experts


def _share_used(name: str, parameter: nn.Parameter, layer: MoeLayer, num_experts: int, choices: int) -> int:
    """Count the elements of a parameter of the experts that one token uses.

    Raises:
        UnknownExpertsError: if the parameter cannot be divided by experts.
    """
    single = isinstance(layer.experts, nn.ModuleList | nn.ModuleDict)
    parts = parameter.shape[0] if parameter.ndim == 3 and not single else num_experts
    if not single and parameter.shape[0] % parts:
        raise UnknownExpertsError(
            f"{name} of shape {tuple(parameter.shape)} cannot be divided by the {num_experts} experts of {layer.name}."
        )
    return choices * parameter.numel() // parts


def _sides(parameter: nn.Parameter, num_experts: int) -> int:
    """Add the sides of the matrices in a parameter: one, or one for each expert. A vector for each has none."""
    if parameter.ndim == 3:
        return parameter.shape[0] * (parameter.shape[1] + parameter.shape[2])
    if parameter.ndim < 2 or parameter.shape[0] == num_experts:
        return 0
    rows = parameter.shape[0] // num_experts  # the experts' matrices lie one below the other
    return num_experts * (rows + parameter.shape[1])


def _ffns_in(layer: nn.Module, without: Collection[int] = ()) -> Iterator[nn.Parameter]:
    """List the parameters of a decoder layer's FFNs, without those that hold one of these parameters."""
    for name, module in layer.named_children():
        if name in _FFNS and not any(id(one) in without for one in module.parameters()):
            yield from module.parameters()


def _refuse_two_blocks(layers: Iterable[MoeLayer]) -> None:
    """Raise UnknownExpertsError if two MoE blocks have the same decoder layer."""
    found: dict[int, MoeLayer] = {}
    for layer in layers:
        if (other := found.setdefault(layer.index, layer)) is not layer:
            raise UnknownExpertsError(
                f"{other.name} and {layer.name} are in one layer, and which of them a token uses cannot be told."
            )


def _refuse_other_experts(model: nn.Module, layers: Iterable[MoeLayer]) -> None:
    """Raise UnknownExpertsError if there are experts in a module that is none of the MoE layers."""
    known = {part for layer in layers for part in layer.block.modules()}
    known |= {part for layer in layers if layer.shared_experts is not None for part in layer.shared_experts.modules()}
    for name, module in model.named_modules():
        experts = name.rpartition(".")[2] == "experts" or "Experts" in type(module).__name__
        if experts and module not in known and next(module.parameters(), None) is not None:
            raise UnknownExpertsError(
                f"{name} ({type(module).__name__}) holds experts, and is in no MoE layer that can be counted: there "
                "is no gate beside it, or it is outside the language model."
            )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


__all__ = ["CountedModel", "CountedMoeLayer", "UnknownExpertsError"]
