"""Several adapters on experts: active together, merged, weighted."""

import copy
from pathlib import Path

import pytest
import torch
from lora_cases import IDS, STACKS, direct, direct_layers, logits, make, plain, several
from peft import LoraConfig, PeftModel
from tolerances import LOW_PRECISION_LOSS, MERGED_LOGITS, assert_same

from modeling_deepseekmoe import (
    expert_lora_config,
    optimize_expert_lora,
)
from modeling_deepseekmoe.moe import DeepseekMoeExperts


@pytest.mark.parametrize("first", ["gate_up", "down"])
def test_adapters_of_one_projection_each_in_one_model(first: str, tmp_path: Path) -> None:
    """Whatever came first, every adapter keeps the names that it has alone."""
    model, second = make(), {"gate_up": "down", "down": "gate_up"}[first]
    adapted = optimize_expert_lora(direct(model, projections=(first,))).eval()
    before = logits(adapted)
    adapted.add_adapter("second", expert_lora_config(model, r=3, projections=(second,), init_lora_weights=False))
    adapted.add_adapter("both", expert_lora_config(model, r=2, init_lora_weights=False))
    adapted.set_adapter("default")
    assert torch.equal(logits(adapted), before)
    adapted.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second"), ("both", tmp_path / "both")):
        adapted.set_adapter(name)
        alone = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        assert_same(logits(alone), logits(adapted), name)
    loaded = optimize_expert_lora(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "both"))
    for name, folder in (("default2", tmp_path), ("second", tmp_path / "second")):
        loaded.load_adapter(folder, name)
        loaded.set_adapter(name)
        adapted.set_adapter(name.removesuffix("2"))
        assert_same(logits(loaded.eval()), logits(adapted), name)


def test_mixed_batches_equal_every_adapter_alone(tmp_path: Path) -> None:
    adapted, outputs = several(tmp_path)
    names = ["down", "__base__", "chosen", "default", "gate_up", "down"]
    found = logits(adapted, IDS[:1].expand(6, -1), adapter_names=names)
    for row, name in zip(found, names, strict=True):
        assert_same(row, outputs[name][0], name)
    found = adapted.generate(IDS[:1].expand(6, -1), adapter_names=names, max_new_tokens=4, do_sample=False)
    for row, name in zip(found, names, strict=True):
        adapted.set_adapter("default" if name == "__base__" else name)
        if name != "__base__":
            assert torch.equal(row, adapted.generate(IDS[:1], max_new_tokens=4, do_sample=False)[0]), name


def test_mixed_batches_of_shared_experts_and_attention() -> None:
    model = make()
    adapted = direct(model, target_modules=("shared_experts", "q_proj")).eval()
    adapted.add_adapter(
        "b", expert_lora_config(model, r=2, target_modules=("shared_experts",), init_lora_weights=False)
    )
    expected = logits(adapted)[0]
    found = logits(adapted, adapter_names=["default", "b"])
    assert_same(found[0], expected)
    adapted.set_adapter("b")
    assert_same(found[1], logits(adapted)[1])


def test_mixed_batches_in_bfloat16() -> None:
    model = make().to(torch.bfloat16)
    adapted = direct(model, target_modules=("shared_experts",)).eval()
    adapted.add_adapter(
        "b", expert_lora_config(model, r=2, target_modules=("shared_experts",), init_lora_weights=False)
    )
    found = logits(adapted, IDS[:1].expand(2, -1), adapter_names=["default", "b"])
    assert found.dtype == torch.bfloat16
    for row, name in zip(found, ("default", "b"), strict=True):
        adapted.set_adapter(name)
        assert (row - logits(adapted, IDS[:1])[0]).abs().max() <= LOW_PRECISION_LOSS


def test_two_active_adapters_add_up() -> None:
    reference = plain(make())
    reference.add_adapter("b", LoraConfig(r=2, target_modules=[], target_parameters=STACKS, init_lora_weights=False))
    ours = optimize_expert_lora(copy.deepcopy(reference))
    for model in (reference, ours):
        model.base_model.set_adapter(["default", "b"])
        model.eval()
    assert_same(logits(ours), logits(reference))


def test_merging_and_unmerging(tmp_path: Path) -> None:
    adapted, outputs = several(tmp_path)
    adapted.set_adapter("default")
    reference = PeftModel.from_pretrained(make(), tmp_path).eval()
    adapted.merge_adapter(["default"])
    reference.merge_adapter()
    assert (logits(adapted) - outputs["default"]).abs().max() <= MERGED_LOGITS
    assert torch.equal(logits(adapted), logits(reference))
    with pytest.raises(ValueError, match=r"adapter_names is not allowed while adapters are merged"):
        logits(copy.deepcopy(adapted), adapter_names=["default", "down"])  # PEFT leaves its hooks after an error
    adapted.unmerge_adapter()
    assert_same(logits(adapted), outputs["default"])
    adapted.merge_adapter(["default"])
    with adapted.disable_adapter():  # takes the merge back, as PEFT's layers do
        assert_same(logits(adapted), outputs["__base__"])
    merged = adapted.merge_and_unload(adapter_names=["down"])
    assert type(merged.model.layers[1].mlp.experts) is DeepseekMoeExperts
    assert (logits(merged) - outputs["down"]).abs().max() <= MERGED_LOGITS
    assert not any("lora" in name for name in merged.state_dict())


def test_unloading_gives_the_base_back() -> None:
    model = make()
    unloaded = direct(model).unload()
    assert unloaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(unloaded), logits(model))


@pytest.mark.parametrize(("combination", "settings"), [("cat", {}), ("svd", {"svd_rank": 14})])
def test_weighted_sums_are_exact_with_enough_rank(combination: str, settings: dict, tmp_path: Path) -> None:
    adapted, _ = several(tmp_path)
    names, weights = ["default", "down", "chosen", "gate_up"], [0.5, -2.0, 1.5, 1.0]
    adapted.add_weighted_adapter(names, weights, "sum", combination_type=combination, **settings)
    checked = 0
    for layer in direct_layers(adapted):
        own = [(name, weight) for name, weight in zip(names, weights, strict=True) if name in layer.lora_A]
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in own)
        assert_same(layer.get_delta_weight("sum"), expected, layer.target_name)
        checked += 1
    assert checked == 4
    adapted.set_adapter("sum")
    found = logits(adapted)
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert_same(logits(PeftModel.from_pretrained(make(), tmp_path / "sum").eval()), found)


def test_a_smaller_rank_is_the_nearest_one() -> None:
    """Eckart and Young, expert by expert, with a rank below the sum."""
    adapted = optimize_expert_lora(direct(make()))
    adapted.add_adapter("b", expert_lora_config(make(), r=4, init_lora_weights=False))
    adapted.add_weighted_adapter(["default", "b"], [1.0, 1.0], "near", combination_type="svd", svd_rank=3)
    layer = direct_layers(adapted)[0]
    exact = (layer.get_delta_weight("default") + layer.get_delta_weight("b"))[5]
    left, values, right = torch.linalg.svd(exact.detach(), full_matrices=False)
    assert_same(layer.get_delta_weight("near")[5], left[:, :3] @ torch.diag(values[:3]) @ right[:3])


@pytest.mark.parametrize("combination", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_other_combinations_are_those_of_peft(combination: str) -> None:
    """They work on the factors, element by element, whatever their layout."""
    from peft.utils.merge_utils import magnitude_prune, task_arithmetic, ties

    adapted = optimize_expert_lora(direct(make()))
    adapted.add_adapter("b", expert_lora_config(make(), r=4, init_lora_weights=False))
    settings = {} if combination == "linear" else {"density": 0.5}
    adapted.add_weighted_adapter(["default", "b"], [1.0, 0.5], "new", combination_type=combination, **settings)
    layer = direct_layers(adapted)[0]
    factors = [layer.lora_A[name].weight.data for name in ("default", "b")]
    weights = torch.tensor([2.0**0.5, 1.0])  # square roots of weight times scaling
    formulas = {
        "linear": lambda: task_arithmetic(factors, weights),
        "ties": lambda: ties(factors, weights, 0.5, "total"),
        "magnitude_prune": lambda: magnitude_prune(factors, weights, 0.5),
    }
    if combination in formulas:
        assert_same(layer.lora_A["new"].weight, formulas[combination]())
    assert layer.lora_A["new"].weight.isfinite().all() and layer.lora_A["new"].weight.any()


def test_a_combination_that_does_not_exist_for_experts() -> None:
    adapted = optimize_expert_lora(direct(make()))
    with pytest.raises(ValueError, match=r"combination_type='ties_svd' is not allowed on stacked experts: .* linear"):
        adapted.add_weighted_adapter(["default"], [1.0], "new", combination_type="ties_svd")
    assert "new" not in adapted.peft_config
