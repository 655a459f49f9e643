"""Try every tool on every MoE family that the installed transformers has, against the family's own eager code.

For each family a tiny model with random weights is made (`family_models`), and then:

- routing: `route_native_gates` gives the same experts, and the same weights to 1e-6.
- experts: `experts_implementation="deepseekmoe"` gives the same logits and all gradients as "eager", to 1e-5 or, where
  the rest of the model makes float32's rounding errors larger, to 1e-9 in float64.
- counting: the counts of a padded batch are those of a loop over the gates' own choices.
- bias: an update moves the family's own bias, or `add_balancing_bias` gives one that changes nothing at first.
- losses: `add_auxiliary_loss` gives the values of formulas in float64 to 1e-6, and the gates' gradients to 1e-5.
- LoRA: `expert_lora_config` gives the logits of plain PEFT, with its adapter loaded, and the other way round.
- quantised: loaded with its experts in "fp8" it gives the logits and gradients of what these decode to, to 1e-5;
  saved and loaded again, the same bits.

Prints the table, and with --save writes benchmarks/results/families.json and the table in docs/families.md. About five
minutes on two cores. Exit code 1 if a tool takes a family and differs from it.

    python benchmarks/families.py [--save] [--only qwen3_moe,glm4_moe]
"""

import argparse
import copy
import json
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from family_models import families, tiny_model
from measuring import RESULTS
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from modeling_deepseekmoe import (
    StackedExpertsConfig,
    add_auxiliary_loss,
    add_balancing_bias,
    expert_lora_config,
    experts,
    route_native_gates,
    take_router_load,
    track_router_load,
    untrack_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.balancing.gates import find_biased_gates
from modeling_deepseekmoe.experts import why_unsupported
from modeling_deepseekmoe.families.gate_rules import in_order, rule_of
from modeling_deepseekmoe.families.moe_layers import (
    MoeLayer,
    find_experts,
    find_moe_layers,
    require_moe_layers,
    stacked_modules,
)

IDS = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(12)[None] < torch.tensor([12, 7, 10])[:, None]).long()
EXPERTS = 8
FIGURES = RESULTS / "families.json"
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families, by benchmarks/families.py -->\n", "<!-- end of the families -->"


class DifferenceError(AssertionError):
    """A tool takes a family, and gives something else."""


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Measure by the norm of the difference."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def same(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare by the norm of the difference."""
    if not (off := difference(found, expected)) <= tolerance:
        raise DifferenceError(f"{name} differ by {off:.0e}")


def prepare(model: nn.Module) -> nn.Module:
    """Give gates other numbers than zeros: biases, tables of experts, weights that begin with zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in find_moe_layers(model):
            if layer.bias is not None:
                layer.bias.tensor.copy_(torch.randn(layer.bias.tensor.shape, generator=generator) * 0.05)
            for tensor in () if layer.gate is None else (*layer.gate.parameters(), *layer.gate.buffers()):
                if tensor.ndim == 2 and not tensor.is_floating_point():
                    tensor.copy_(torch.rand(len(tensor), EXPERTS, generator=generator).topk(tensor.shape[1]).indices)
                elif tensor.ndim == 2 and not tensor.any():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def run(model: nn.Module) -> torch.Tensor:
    """Run a model on the padded batch. Return what it predicts for real tokens."""
    torch.manual_seed(0)  # some gates draw their choices in training
    outputs = model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    found = outputs.logits if getattr(outputs, "logits", None) is not None else outputs.last_hidden_state
    return found[MASK.bool()]


def gradients_of(model: nn.Module, result: torch.Tensor) -> torch.Tensor:
    """Return all gradients of a model, in one vector."""
    model.zero_grad()
    result.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def try_routing(model: nn.Module) -> str:
    """Compare every gate's choices and weights, for the same hidden states."""
    own, fused = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    routed = route_native_gates(fused)
    expected, found = (seen_choices(one) for one in (own, fused))
    for (ids, weights), (other_ids, other_weights) in zip(expected, found, strict=True):
        if not torch.equal(ids, other_ids):
            raise DifferenceError("choices differ")
        same("weights", other_weights, weights, 1e-6)
    same("gradients", gradients_of(fused, run(fused)), gradients_of(own, run(own)), 5e-5)
    layers = len(find_moe_layers(model))
    return "yes" if routed == layers else f"{routed} of {layers} gates"


def seen_choices(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run a model and collect ids and weights of every call of experts, each token's sorted by the ids."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(in_order(args[1], args[2]))

    handles = [layer.experts.register_forward_pre_hook(see) for layer in find_moe_layers(model)]
    with torch.no_grad():
        run(model)
    for handle in handles:
        handle.remove()
    return seen


def try_experts(model: nn.Module) -> str:
    """Compare logits and all gradients."""
    stacked = [module for layer in find_moe_layers(model) for module in stacked_modules(layer)]
    if not stacked:
        raise ValueError(f"{type(model).__name__} has no stacked experts")
    if reason := next(filter(None, map(why_unsupported, stacked)), None):
        raise ValueError(reason)
    found, expected = ([*with_experts(model, name)] for name in ("deepseekmoe", "eager"))
    tolerance = 1e-5
    if max(map(difference, found, expected)) > tolerance:  # the rest of the model makes rounding errors larger
        found, expected = ([*with_experts(model, name, torch.float64)] for name in ("deepseekmoe", "eager"))
        tolerance = 1e-9
    for name, one, other in zip(("logits", "gradients"), found, expected, strict=True):
        same(name, one, other, tolerance)
    return "yes"


def with_experts(model: nn.Module, implementation: str, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    """Yield the logits and all gradients of a model with an experts implementation."""
    model = copy.deepcopy(model).to(dtype).train()
    model.set_experts_implementation(implementation)
    result = run(model)
    yield result.detach()
    yield gradients_of(model, result)


def try_counting(model: nn.Module) -> str:
    """Count by the gates' own outputs, token by token; by the experts' calls where the block chooses."""
    model = copy.deepcopy(model).train()
    layers = require_moe_layers(model)
    expected = [torch.zeros(layer.num_experts, dtype=torch.long) for layer in layers]
    outputs: dict[str, Any] = {}

    def hook_of(place: int, layer: MoeLayer) -> Callable[..., None]:
        def count(experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            output = outputs.pop(layer.name)
            seen = (output[2], output[1]) if chooses(output) else args[1:3]
            ids, weights = (one.tolist() for one in seen)
            for row, row_weights, real in zip(ids, weights, MASK.flatten().tolist(), strict=True):
                for expert, weight in zip(row, row_weights, strict=True):
                    skipped = layer.has_skip_class and weight == 0
                    expected[place][-1 if skipped else expert] += real

        return count

    handles = []
    for place, layer in enumerate(layers):
        assert layer.gate is not None
        keep = lambda gate, args, output, name=layer.name: outputs.__setitem__(name, output)  # noqa: E731
        handles += [layer.gate.register_forward_hook(keep)]
        handles += [layer.experts.register_forward_pre_hook(hook_of(place, layer))]
    track_router_load(model)
    run(model)
    for handle in handles:
        handle.remove()
    load = take_router_load(model).tokens_per_expert
    untrack_router_load(model)
    if not torch.equal(load, torch.stack(expected)):
        raise DifferenceError("counts differ")
    return "yes"


def chooses(output: Any) -> bool:
    """Tell whether what a gate returns are logits, weights and ids, in this order."""
    return isinstance(output, tuple) and len(output) > 2 and not output[2].is_floating_point()


def try_bias(model: nn.Module) -> str:
    """Update the family's own bias, or add one."""
    model = copy.deepcopy(model).train()
    gates = find_biased_gates(model)
    if not gates:
        before = run(model)
        add_balancing_bias(model)
        same("logits", run(model), before, 1e-5)
        gates, word = find_biased_gates(model), "can be added"
    else:
        word = ", ".join({f"`{gate.layer.bias.name}`": None for gate in gates if gate.layer.bias is not None})
    track_router_load(model)
    before = [gate.bias.clone() for gate in gates]
    run(model)
    loads = update_router_bias(model, 0.1).tokens_per_expert
    for old, gate in zip(before, gates, strict=True):
        if torch.equal(old, gate.bias) == bool(loads[gate.place].any()):  # of an image's experts none has a token
            raise DifferenceError("a bias stayed as it was")
    return word


def try_losses(model: nn.Module) -> str:
    """Compare the expert-level loss and the z-loss with their formulas in float64, and the gates' gradients."""
    added, own = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    add_auxiliary_loss(added, expert=0.5, z=0.01)
    logits, terms, handles = {}, [], []
    for layer in find_moe_layers(own):
        assert layer.gate is not None
        score = rule_of(layer).options.score_function

        def keep(gate: nn.Module, args: Any, output: Any, layer: MoeLayer = layer) -> None:
            logits[layer.name] = output[0].double()

        def see(experts: nn.Module, args: Any, layer: MoeLayer = layer, score: str = score) -> None:
            terms.append(losses_of(score, logits.pop(layer.name), args[1]))

        handles += [layer.gate.register_forward_hook(keep), layer.experts.register_forward_pre_hook(see)]
    run(own)
    expected = torch.stack(terms).sum()
    torch.manual_seed(0)
    outputs = added(input_ids=IDS, attention_mask=MASK, use_cache=False)
    same("losses", outputs.aux_loss, expected, 1e-6)
    result = outputs.last_hidden_state if getattr(outputs, "logits", None) is None else outputs.logits
    (0.0 * result.sum() + outputs.aux_loss).backward()
    expected.backward()
    for layer, other in zip(find_moe_layers(added), find_moe_layers(own), strict=True):
        assert layer.gate is not None and other.gate is not None
        for mine, theirs in zip(layer.gate.parameters(), other.gate.parameters(), strict=True):
            if theirs.grad is not None and theirs.grad.any():
                same("gradients", mine.grad, theirs.grad, 1e-5)
    return "yes"


def losses_of(score: str, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compute 0.5 times the loss of 2401.06066, eq. 12, by sequence, and 0.01 times that of 2202.08906, eq. 5."""
    logits, ids = logits.view(*MASK.shape, -1), ids.view(*MASK.shape, -1)
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(),
              "sqrtsoftplus": nn.functional.softplus(logits).sqrt()}[score]  # fmt: skip
    shares, total = scores / scores.sum(-1, keepdim=True), 0.0
    for row, real in enumerate(MASK.bool()):
        chosen = torch.stack([(ids[row][real] == expert).sum() for expert in range(logits.shape[-1])])
        f = chosen * logits.shape[-1] / (ids.shape[-1] * int(real.sum()))
        total = total + 0.5 * (f * shares[row][real].mean(0)).sum() / len(MASK)
    return total + 0.01 * logits[MASK.bool()].logsumexp(-1).square().mean()


def try_lora(model: nn.Module) -> str:
    """Load an adapter of plain PEFT here, and one of here there."""
    config = expert_lora_config(model, r=4)
    stacks = sorted(f"{name.rpartition('.')[2]}.{stack}" for name, _ in list(find_experts(model).values())[:1]
                    for stack in ("gate_up_proj", "down_proj"))  # fmt: skip
    plain = LoraConfig(r=4, lora_alpha=config.lora_alpha, target_parameters=stacks, target_modules=[])
    ours, theirs = get_peft_model(copy.deepcopy(model), config), get_peft_model(copy.deepcopy(model), plain)
    word = "yes"
    for source, target in ((ours, theirs), (theirs, ours)):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in source.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if set_peft_model_state_dict(target, get_peft_model_state_dict(source)).unexpected_keys:
            word = "yes, but PEFT does not load its files"
            parameters = dict(target.named_parameters())
            with torch.no_grad():
                for name, parameter in source.named_parameters():
                    parameters[name].copy_(parameter)
        with torch.no_grad():
            expected, found = run(source.eval()), run(target.eval())
            same("logits", found, expected, 1e-5)
            with source.disable_adapter():
                if torch.equal(run(source), expected):
                    raise DifferenceError("the adapter does nothing")
    return word


def try_quantised(model: nn.Module) -> str:
    """Load a model with experts in "fp8", compare it with what these decode to, and save it and load it again."""
    with tempfile.TemporaryDirectory() as temporary:
        plain, quantised = Path(temporary, "plain"), Path(temporary, "quantised")
        model.save_pretrained(plain)
        config = StackedExpertsConfig(format="fp8")
        loaded = type(model).from_pretrained(plain, dtype=torch.float32, quantization_config=config).train()
        result = run(loaded)
        loaded.eval().save_pretrained(quantised)
        with torch.no_grad():
            again = type(model).from_pretrained(quantised, dtype=torch.float32)
            if not torch.equal(run(again), run(loaded)):
                raise DifferenceError("logits of what was saved differ")
    gradients = gradients_of(loaded, result)
    decoded = loaded.dequantize(torch.float32).train()
    for layer in find_moe_layers(decoded):
        for module in stacked_modules(layer):
            module.requires_grad_(False)
    expected = run(decoded)
    same("logits", result, expected, 1e-5)
    same("gradients", gradients, gradients_of(decoded, expected), 1e-5)
    return "yes"


TOOLS: dict[str, Callable[[nn.Module], str]] = {
    "routing": try_routing, "experts": try_experts, "counting": try_counting, "bias": try_bias, "losses": try_losses,
    "LoRA": try_lora, "quantised": try_quantised,
}  # fmt: skip


def outcome(tool: Callable[[nn.Module], str], model: nn.Module) -> tuple[str, bool]:
    """Return what a tool does with a family, and whether it is wrong."""
    try:
        return tool(model), False
    except DifferenceError as error:
        return f"WRONG: {error}", True
    except ValueError as error:  # a refusal
        return f"no: {short(str(error))}", False
    except Exception as error:  # neither a result nor a refusal
        traceback.print_exc()
        return f"FAILED: {type(error).__name__}: {short(str(error))}", True


def short(text: str) -> str:
    """Cut a message down to its reason."""
    text = text.strip().splitlines()[0].rstrip(".").split(". ")[0]
    text = re.sub(r"^.*is not allowed( for [\w ]+| to be quantised)?: ", "", text)
    text = re.sub(r"^\w+ (has no (MoE layer|stacked experts)).*", r"it \1 of this structure", text)
    text = re.sub(r"(parameters whose part is not known).*", r"\1", text)
    return text[:120].replace("|", "/")


def describe(family: str) -> dict[str, str]:
    """Try all tools on a family."""
    try:
        model = prepare(tiny_model(family)).train()
        with torch.no_grad():
            run(model)
    except Exception as error:
        return {"family": family, "model": f"no tiny model: {type(error).__name__}: {short(str(error))}"}
    row, wrong = {"family": family, "model": type(model).__name__}, False
    for name, tool in TOOLS.items():
        row[name], is_wrong = outcome(tool, model)
        wrong |= is_wrong
    return row | ({"wrong": "yes"} if wrong else {})


def table(rows: list[dict[str, str]]) -> str:
    """Make the table of Markdown, with the reasons below."""
    reasons: dict[str, int] = {}

    def cell(text: str) -> str:
        if not text.startswith("no: "):
            return text
        return f"no ({reasons.setdefault(text.removeprefix('no: '), len(reasons) + 1)})"

    lines = [f"| family | {' | '.join(TOOLS)} |", f"|{' --- |' * (len(TOOLS) + 1)}"]
    tried = [row for row in rows if "routing" in row]
    lines += [f"| `{row['family']}` | {' | '.join(cell(row[name]) for name in TOOLS)} |" for row in tried]
    found = [f"{number}. {reason}." for reason, number in reasons.items()]
    left = ", ".join(f"`{row['family']}`" for row in rows if "routing" not in row)
    ending = [f"\nThe script could not make a tiny model of {left}."] if left else []
    return "\n".join([*lines, "", "Why not:", "", *found, *ending])


def main() -> int:
    """Try everything, print the table, and write it if it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the results, and the table of docs/families.md")
    parser.add_argument("--only", default="", help="names of families, with commas")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    experts.LOOP_FROM = 0  # experts as small as these would all have the backend of small ones
    wanted = [family for family in families() if not arguments.only or family in arguments.only.split(",")]
    rows = []
    for family in wanted:
        rows.append(describe(family))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.save and arguments.only:  # the other families as they were
        before = json.loads(FIGURES.read_text(encoding="utf-8"))
        if before["transformers"] != transformers.__version__:
            sys.exit(f"{FIGURES.name} is of transformers {before['transformers']}: run without --only.")
        known = {row["family"]: row for row in (*before["rows"], *rows)}
        rows = [known[name] for name in sorted(known)]
    text = table(rows)
    print(f"\ntransformers {transformers.__version__}\n\n{text}")
    if arguments.save:
        figures = {"python": platform.python_version(), "torch": torch.__version__,
                   "transformers": transformers.__version__, "rows": rows}  # fmt: skip
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        version = f"Made with transformers {transformers.__version__}, by `benchmarks/families.py`.\n\n"
        PAGE.write_text(
            before + BEGIN + "\n" + version + text + "\n\n" + END + rest.partition(END)[2], encoding="utf-8"
        )
    return 1 if any("wrong" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
