"""Every generation against figures of the official code (tests/data/golden)."""

import re
from collections.abc import Callable

import pytest
import torch
from conftest import BOTH_SIZES, EXPERTS_IMPLEMENTATIONS, TRAINABLE_NAMES, Golden
from tolerances import GOLDEN_AUX_LOSS, GOLDEN_GRADIENT, GOLDEN_LOGITS, GOLDEN_TASK_LOSS, GOLDEN_WEIGHTS

from modeling_deepseekmoe import DeepseekMoePreTrainedModel

pytestmark = BOTH_SIZES

implementations = pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
trainable = pytest.mark.parametrize("name", TRAINABLE_NAMES)


@implementations
def test_logits_and_padded_logits(golden: Golden, implementation: str, count_calls: Callable) -> None:
    calls = count_calls(implementation)
    model, expected = golden.model(experts_implementation=implementation), golden.expected
    assert isinstance(model, DeepseekMoePreTrainedModel)
    mask = expected["padded_attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
        padded = model(expected["input_ids"], attention_mask=mask, position_ids=positions).logits
    assert len(calls) == 2 * len(model.config.moe_layers)
    assert (logits - expected["logits"]).abs().max() <= GOLDEN_LOGITS
    assert (padded - expected["padded_logits"])[mask.bool()].abs().max() <= GOLDEN_LOGITS


@implementations
def test_greedy_generation_with_the_cache(golden: Golden, implementation: str) -> None:
    model, expected = golden.model(experts_implementation=implementation), golden.expected
    model.generation_config.eos_token_id = None
    prompt = expected["input_ids"][:1, :9]
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generated, expected["generated"])


def test_gates_choose_the_same_experts_with_the_same_weights(golden: Golden) -> None:
    model, expected = golden.model(), golden.expected
    layers = [int(match[1]) for key in expected if (match := re.fullmatch(r"eval\.layer(\d+)\.topk_idx", key))]
    assert layers == list(model.config.moe_layers)
    for layer in layers:
        hidden = expected[f"eval.layer{layer}.hidden"].flatten(0, 1)
        ids, weights = expected[f"eval.layer{layer}.topk_idx"], expected[f"eval.layer{layer}.topk_weight"]
        _, plan = model.model.layers[layer].mlp.gate(hidden)
        assert torch.equal(plan.expert_ids.sort().values, ids.sort().values)
        table = torch.zeros(len(hidden), model.config.n_routed_experts)
        ours, theirs = table.scatter(1, plan.expert_ids, plan.weights), table.scatter(1, ids, weights)
        assert (ours - theirs).abs().max() <= GOLDEN_WEIGHTS


@implementations
@trainable
def test_training_losses_and_gradients(name: str, implementation: str) -> None:
    golden = Golden(name)
    model, expected = golden.model(experts_implementation=implementation).train(), golden.expected
    aux_losses: dict[int, torch.Tensor] = {}
    for layer in model.config.moe_layers:
        block = model.model.layers[layer].mlp
        block.register_forward_hook(
            lambda _, __, output, layer=layer: aux_losses.update({layer: output[1].losses.sum()})
        )
    outputs = model(expected["input_ids"], labels=expected["input_ids"])
    outputs.loss.backward()

    official = {int(key[11:-9]) for key in expected if key.endswith(".aux_loss")}
    assert set(aux_losses) == official == set(model.config.moe_layers)
    task_loss = outputs.loss - outputs.aux_loss
    assert (task_loss - expected["train.task_loss"]).abs() <= GOLDEN_TASK_LOSS
    assert outputs.aux_loss.item() == pytest.approx(sum(loss.item() for loss in aux_losses.values()))
    for layer, aux_loss in aux_losses.items():
        assert (aux_loss - expected[f"train.layer{layer}.aux_loss"]).abs() <= GOLDEN_AUX_LOSS

    gradients = official_gradients(model)
    wanted = {key.removeprefix("grad."): value for key, value in expected.items() if key.startswith("grad.")}
    assert len(wanted) == (13 if name == "v1-gqa-norm" else 12)
    for key, gradient in wanted.items():
        assert (gradients[key] - gradient).norm() <= GOLDEN_GRADIENT * gradient.norm(), key


def official_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients under the official, per-expert tensor names."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert, stacked in enumerate(parameter.grad):
                gate, up = stacked.chunk(2)
                prefix = f"{name.removesuffix('.gate_up_proj')}.{expert}"
                gradients |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(parameter.grad):
                gradients[f"{name.removesuffix('.down_proj')}.{expert}.down_proj.weight"] = down
        else:
            gradients[name] = parameter.grad
    return gradients


def test_the_released_v3_code_has_no_auxiliary_loss(v3: Golden) -> None:
    """Its config.json says aux_loss_alpha: 0.01 all the same."""
    model, input_ids = v3.model().train(), v3.expected["input_ids"]
    assert model.config.aux_loss_alpha == 0.01
    outputs = model(input_ids, labels=input_ids)
    assert outputs.aux_loss == 0
    assert outputs.loss.item() == model.eval()(input_ids, labels=input_ids).loss.item()
