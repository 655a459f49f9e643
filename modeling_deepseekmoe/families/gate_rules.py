# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""By which rule the gate of another package chooses: found by trying, on a small stand-in with random weights.

The stand-in computes as the gate does. What it returns for random hidden states is compared with [`route`] under all
options that it may stand for. The rule that gives the same experts, the same weights and the same gradients, in
training and in evaluation, is the gate's. So nothing depends on the class of a gate, and a family that appears
tomorrow is understood if `route` can express it.

Shape letters: T tokens, D hidden, E routed experts, K chosen experts of a token.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..routing import Routing, choose_experts
from ..routing_options import BIAS_PLACES, GROUP_SCORES, SCORE_FUNCTIONS, RoutingOptions
from .moe_layers import MoeLayer, unwrapped

RULE = "rule_that_routes"  # attribute of a gate whose forward was replaced
TOKENS = 48
LOW_LOGITS = (-9.0, -20.0)  # means of logits that are far below zero
TOLERANCE = 1e-5  # of weights and gradients in float32, by their norm; another rule is off by more than 1e-4
# Names of the numbers of groups, and of those that a token may use.
GROUPS = (("num_group", "topk_group"), ("n_group", "topk_group"), ("num_expert_group", "topk_group"))


class UnknownGateError(ValueError):
    """A gate chooses by a rule that [`route`] does not express."""


@dataclass(frozen=True)
class GateRule:
    """The rule of a gate.

    Attributes:
        options: how it chooses.
        matrix: the path of the parameter (E, D) whose product with the hidden states gives the logits.
        offset: the path of a trained offset of the logits, or "".
        in_float32: whether that product is in float32, or in the dtype of the matrix.
        factor: what the logits are multiplied by before anything else.
        takes: the name of the gate's second argument: a bias, token ids, or "" if there is none.
        table: the path of the table (V, K) of fixed experts for each token id, or "".
        ignores_autocast: whether the product is the same under autocast.
        logits_in_float32, weights_in_float32: whether the gate returns them in float32, or in the dtype of the hidden
            states.
    """

    options: RoutingOptions
    matrix: str
    offset: str
    in_float32: bool
    factor: float
    takes: str
    table: str
    ignores_autocast: bool = False
    logits_in_float32: bool = True
    weights_in_float32: bool = True

    def with_implementation(self, implementation: str) -> "GateRule":
        """Return the same rule, computed by another implementation of [`route`]."""
        fixed = bool(self.table) and implementation == "triton"  # of a fixed choice there are no kernels
        return replace(self, options=replace(self.options, implementation="auto" if fixed else implementation))

    def logits(self, gate: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the gate logits (T, E) of hidden states (..., D)."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.ignores_autocast:
            with torch.autocast(hidden_states.device.type, enabled=False):
                return self._logits(gate, hidden_states)
        return self._logits(gate, hidden_states)

    def _logits(self, gate: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        inner, _, _ = self.matrix.rpartition(".")
        if inner and not self.in_float32:  # a module of its own, which may have an adapter or hooks
            logits = gate.get_submodule(inner)(hidden_states)
            return logits if self.factor == 1.0 else logits * self.factor
        matrix, offset = tensor_at(gate, self.matrix), tensor_at(gate, self.offset) if self.offset else None
        if self.in_float32:
            hidden_states, matrix = hidden_states.float(), matrix.float()
            offset = None if offset is None else offset.float()
        logits = F.linear(hidden_states.to(matrix.dtype), matrix, offset)
        return logits if self.factor == 1.0 else logits * self.factor

    def route(
        self,
        gate: nn.Module,
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        argument: torch.Tensor | None = None,
        **more: Any,
    ) -> Routing:
        """Choose by logits (T, E).

        Args:
            gate: the gate.
            logits: its logits.
            bias: its balancing bias, of E values.
            argument: its second argument, if it has one. A bias that is given takes the place of its own.
            more: as for [`choose_experts`].
        """
        given = None
        if self.table:
            assert argument is not None
            given = tensor_at(gate, self.table)[argument.reshape(-1)]
        elif self.takes and argument is not None:
            bias = argument
        bias = None if bias is None or self.table else bias.detach().reshape(-1).float()
        return choose_experts(logits, self.options, correction_bias=bias, expert_ids=given, **more)


def rule_of(layer: MoeLayer) -> GateRule:
    """Find the rule of a layer's gate.

    Raises:
        UnknownGateError: if [`route`] does not express it; the message names the module and says why.
    """
    gate = layer.gate
    if gate is None:
        raise UnknownGateError(f"{layer.name} is not allowed: there is no gate beside its experts.")
    if RULE in vars(gate):  # it was replaced
        return vars(gate)[RULE]
    layer = unwrapped(layer)
    name = f"{layer.gate_path} ({type(layer.gate).__name__})"
    try:  # whatever modes the caller has set
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            return _find(layer)
    except UnknownGateError as error:
        raise UnknownGateError(f"{name} is not allowed: {error}.") from None
    except Exception as error:  # whatever a gate of another package raises on a stand-in
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise UnknownGateError(f"{name} is not allowed: a copy with random weights fails ({reason}).") from error


def tensor_at(module: nn.Module, path: str) -> torch.Tensor:
    """Return the parameter or buffer at a path such as `gate.weight`, of the module that is in use now."""
    *parts, name = path.split(".")
    for part in parts:
        module = getattr(module, part)
    return getattr(module, name)


# ----------------------------------------------------------------------------------------------------- the stand-in
def _stand_in(gate: nn.Module, tensors: dict[int, torch.Tensor]) -> nn.Module:
    """Copy a gate with other tensors in place of its own: nothing large is copied, and no hook."""
    memo: dict[int, Any] = dict(tensors)
    for part in gate.modules():
        own = vars(part)
        memo |= {id(value): type(value)() for name, value in own.items() if "hook" in name and isinstance(value, dict)}
        memo |= {id(own[name]): None for name in ("forward", "_old_forward", "_hf_hook") if name in own}
        if "config" in own:
            memo[id(own["config"])] = own["config"]
    stand_in = copy.deepcopy(gate, memo)
    for part in stand_in.modules():
        for name in ("forward", "_old_forward", "_hf_hook"):
            vars(part).pop(name, None)
    return stand_in


class _Trial:
    """The stand-in of a gate, its inputs, and what it returns for them.

    Args:
        layer: the MoE layer.
        dtype: of hidden states and of the stand-in's tensors.
        seed: of all random numbers.
        mean: make all numbers of the product of the same sign, with this mean, far from zero: what is added to a sum
            of scores shows then.
        bias_level: the mean of the bias. Where it is far below zero, scores plus bias are negative.
    """

    def __init__(
        self, layer: MoeLayer, dtype: torch.dtype, seed: int = 0, mean: float | None = None, bias_level: float = 0.0
    ) -> None:
        gate, experts = layer.gate, layer.num_experts
        assert gate is not None
        self.num_experts, self.takes, self.seed = experts, _second_argument(gate), seed
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        self.matrix, self.offset = _matrix_of(gate, experts), _offset_of(gate, experts)
        width = tensor_at(gate, self.matrix).shape[1]
        matrix, hidden = numbers(experts, width) * 1.5 * width**-0.5, numbers(TOKENS, width)
        if mean is not None:
            matrix, hidden = matrix.abs(), hidden.abs()
            matrix *= mean / (hidden @ matrix.T).mean()
        spread = 0.3 if mean is None else 1e-4
        self.bias = None if layer.bias is None else (numbers(experts) * spread + bias_level).to(dtype)
        self.hidden = hidden.to(dtype).requires_grad_()
        random: dict[int, torch.Tensor] = {id(tensor_at(gate, self.matrix)): nn.Parameter(matrix.to(dtype))}
        if self.offset:
            random[id(tensor_at(gate, self.offset))] = nn.Parameter(numbers(experts).to(dtype))
        if layer.bias is not None and self.bias is not None:
            own = layer.bias.tensor
            given = self.bias.view(own.shape)
            random[id(own)] = nn.Parameter(given, requires_grad=False) if isinstance(own, nn.Parameter) else given
        unknown = [name for name, one in gate.named_parameters() if id(one) not in random]
        if unknown:
            raise UnknownGateError(f"it has parameters whose part is not known: {', '.join(unknown)}")
        self.table, self.argument = "", None
        for name, buffer in gate.named_buffers():
            if buffer.ndim == 2 and not buffer.is_floating_point():
                self.table = name
                chosen = torch.rand(len(buffer), experts, generator=generator).topk(buffer.shape[1]).indices
                random[id(buffer)] = chosen
                self.argument = torch.randint(len(buffer), (TOKENS,), generator=generator)
        if "bias" in self.takes:
            self.argument = self.bias
        elif self.takes and not self.table:
            raise UnknownGateError(f"it is called with {self.takes}")
        self.gate = _stand_in(gate, random)

    def run(self, training: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the gate itself. Return logits (T, E), weights (T, K) and ids (T, K)."""
        rest = () if self.argument is None else (self.argument,)
        self.gate.train(training)
        torch.default_generator.manual_seed(self.seed)  # the CPU's alone; rule_of keeps its state
        try:
            output = self.gate(self.hidden, *rest)
        except (ValueError, IndexError):  # some want a batch
            output = self.gate(self.hidden[None], *rest)
        if not isinstance(output, tuple) or len(output) != 3:
            what = f"{len(output)} values" if isinstance(output, tuple) else f"a {type(output).__name__}"
            raise UnknownGateError(f"it returns {what}, and not logits, weights and expert ids")
        logits, weights, ids = output
        same = ids.ndim == 2 and ids.shape == weights.shape and not ids.is_floating_point()
        if not same or logits.shape[-1] != self.num_experts:
            raise UnknownGateError("it does not return logits (T, E), weights (T, K) and expert ids (T, K)")
        return logits.reshape(-1, self.num_experts), weights, ids


def _matrix_of(gate: nn.Module, num_experts: int) -> str:
    """Find the parameter (E, D) that makes the logits."""
    shapes = {name: tuple(parameter.shape) for name, parameter in gate.named_parameters()}
    found = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == num_experts]
    if len(found) != 1:
        has = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "no parameters"
        raise UnknownGateError(f"it must have one matrix with {num_experts} rows, one an expert, and has {has}")
    return found[0]


def _offset_of(gate: nn.Module, num_experts: int) -> str:
    """Find a trained offset of the logits."""
    own = dict(gate.named_parameters(recurse=False))
    return "bias" if "bias" in own and own["bias"].shape == (num_experts,) else ""


def _second_argument(gate: nn.Module) -> str:
    """Return the name of the gate's second argument, or ""."""
    parameters = list(inspect.signature(type(gate).forward).parameters.values())[2:]
    named = [parameter for parameter in parameters if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]
    required = [parameter.name for parameter in named if parameter.default is parameter.empty]
    if len(required) > 1:
        raise UnknownGateError(f"it is called with {', '.join(required)}")
    return named[0].name if named else ""


# ----------------------------------------------------------------------------------------------------------- trying
def _find(layer: MoeLayer) -> GateRule:
    trial = _Trial(layer, torch.float32)
    with torch.no_grad():
        logits, weights, ids = trial.run()
        rule = GateRule(RoutingOptions(ids.shape[1]), trial.matrix, trial.offset, True, 1.0, trial.takes, trial.table)
        rule = replace(rule, factor=_factor(rule.logits(trial.gate, trial.hidden), logits))
        for options in _options(layer.gate, trial, ids.shape[1]):
            scale = _scale(replace(rule, options=options), trial, ids, weights)
            if scale is not None:
                break
        else:
            raise UnknownGateError("route() has no options that give its experts and their weights")
    rule = replace(rule, options=replace(options, scaling_factor=scale))
    low, lowest = (mean / rule.factor for mean in LOW_LOGITS)
    rule = replace(
        rule, options=replace(rule.options, epsilon=_epsilon(rule, _Trial(layer, torch.float32, mean=lowest)))
    )
    for seed, mean, level, training in (
        (1, None, 0.0, True),
        (2, None, -1.5, False),
        (3, low, 0.0, False),
        (4, lowest, 0.0, False),
    ):
        _check(rule, _Trial(layer, torch.float32, seed, mean, level), training)
    rule = _with_dtypes(rule, layer)
    return replace(rule, options=replace(rule.options, implementation="auto"))


def _digits(number: float) -> float:
    """Round a measured factor to the number of few digits that it is, if it is one."""
    few = float(f"{number:.5g}")
    return few if abs(few - number) <= 1e-6 * abs(number) else float(f"{number:.7g}")


def _factor(product: torch.Tensor, logits: torch.Tensor) -> float:
    """Return what the product is multiplied by to give the logits."""
    factor = _digits(float((logits * product).sum() / product.square().sum()))
    if not torch.allclose(factor * product, logits, atol=1e-4, rtol=1e-4):
        raise UnknownGateError("its first output is not the product of the hidden states and its matrix")
    return factor


def _options(gate: nn.Module | None, trial: _Trial, top_k: int) -> Iterator[RoutingOptions]:
    """List the options that a gate may stand for."""
    groups = [(1, 1, "max")]
    for name, name_of_kept in GROUPS:
        number, kept = getattr(gate, name, None), getattr(gate, name_of_kept, None)
        if isinstance(number, int) and isinstance(kept, int) and number > 1:
            groups += [(number, kept, score) for score in GROUP_SCORES]
            break
    for score in SCORE_FUNCTIONS:
        for number, kept, group_score in groups:
            for place in BIAS_PLACES if number == 1 and trial.bias is not None else BIAS_PLACES[:1]:
                for normalize in (False, True):
                    yield RoutingOptions(
                        top_k, score, number, kept, group_score, normalize, bias_on=place, implementation="eager"
                    )


def in_order(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort each token's choices by their ids: gates return them in any order."""
    order = ids.argsort(dim=1, stable=True)
    return ids.gather(1, order), weights.gather(1, order)


def _scale(rule: GateRule, trial: _Trial, ids: torch.Tensor, weights: torch.Tensor) -> float | None:
    """Return the factor between a gate's weights and a rule's; `None` if the rule chooses or weighs otherwise."""
    try:
        routing = rule.route(trial.gate, rule.logits(trial.gate, trial.hidden), trial.bias, trial.argument)
    except ValueError:  # these options are none for a gate of this size
        return None
    (found_ids, found), (ids, weights) = in_order(routing.expert_ids, routing.weights), in_order(ids, weights)
    if not torch.equal(found_ids, ids):
        return None
    scale = _digits(float((weights * found).sum() / found.square().sum()))
    return scale if torch.allclose(scale * found, weights, atol=1e-6, rtol=TOLERANCE) else None


@torch.no_grad()
def _epsilon(rule: GateRule, trial: _Trial) -> float:
    """Return what is added to a sum of scores, from scores that are small, or else the usual number."""
    options = rule.options
    if not options.normalize:
        return options.epsilon
    _, weights, ids = trial.run()
    scores_alone = replace(rule, options=replace(options, normalize=False))
    routing = scores_alone.route(trial.gate, rule.logits(trial.gate, trial.hidden), trial.bias, trial.argument)
    (found_ids, scores), (ids, weights) = in_order(routing.expert_ids, routing.weights), in_order(ids, weights)
    if not torch.equal(found_ids, ids):  # which is told later
        return options.epsilon
    # weights = scores / (sum + epsilon), and the scores here are multiplied by the scaling factor.
    total = scores.double().sum(1, keepdim=True) / options.scaling_factor
    added = scores.double() / weights.double() - total
    shows = added.mean() > 1e-5 * total.mean() and added.std() < 0.1 * added.mean()  # and is no rounding error
    return float(f"{float(added.mean()):.3g}") if shows else options.epsilon


def _check(rule: GateRule, trial: _Trial, training: bool) -> None:
    """Compare choices, weights and the gradient of the hidden states.

    Raises:
        UnknownGateError: if they differ.
    """
    _, weights, ids = trial.run(training)
    routing = rule.route(trial.gate, rule.logits(trial.gate, trial.hidden), trial.bias, trial.argument)
    (found_ids, found), (ids, weights) = in_order(routing.expert_ids, routing.weights), in_order(ids, weights)
    where = "in training" if training else "where scores are small or negative"
    if not torch.equal(found_ids, ids):
        raise UnknownGateError(f"it chooses other experts than route() {where}")
    factor = torch.randn(weights.shape, generator=torch.Generator().manual_seed(trial.seed))
    gradients = [torch.autograd.grad((of * factor).sum(), trial.hidden)[0] for of in (weights, found)]
    for name, one, other in (("weights", weights, found), ("gradients", *gradients)):
        off = float((one - other).detach().norm() / one.detach().norm().clamp(min=1e-12))
        if not off <= 10 * TOLERANCE:
            raise UnknownGateError(f"its {name} differ from those of route() {where}, by {off:.0e} of their norm")


@torch.no_grad()
def _with_dtypes(rule: GateRule, layer: MoeLayer) -> GateRule:
    """Find the dtypes of the product, and of what is returned, for hidden states in bfloat16."""
    trial = _Trial(layer, torch.bfloat16)
    try:
        logits, weights, _ = trial.run()
    except RuntimeError:  # it wants its own tensors in float32
        trial.gate.float()
        logits, weights, _ = trial.run()
    in_float32, stored = (
        replace(rule, in_float32=wide).logits(trial.gate, trial.hidden).float() for wide in (True, False)
    )
    nearer = (in_float32 - logits.float()).norm() <= (stored - logits.float()).norm()
    under = _Trial(layer, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits_under = under.run()[0].float()
    ignores = torch.equal(logits_under, replace(rule, ignores_autocast=True).logits(under.gate, under.hidden).float())
    of_logits, of_weights = (tensor.dtype == torch.float32 for tensor in (logits, weights))
    dtypes = {"logits_in_float32": of_logits, "weights_in_float32": of_weights, "ignores_autocast": ignores}
    return replace(rule, in_float32=bool(nearer), **dtypes)


__all__ = ["RULE", "GateRule", "UnknownGateError", "in_order", "rule_of", "tensor_at"]
