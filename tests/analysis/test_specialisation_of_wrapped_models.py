"""Specialisation of models that are compiled, offloaded, adapted or in bfloat16: right, or said."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from other_families import family
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import expert_lora_config, measure_specialisation
from modeling_deepseekmoe.analysis.specialisation import Specialisation

TEXT = {"": list(torch.randint(3, 90, (2, 2, 12), generator=torch.Generator().manual_seed(3)))}


def measure(model: nn.Module, **more: Any) -> Specialisation:
    return measure_specialisation(model, TEXT, title="model", source="random", **more)


def rises(found: Specialisation) -> list[float]:
    return [
        point["rise"]
        for key in ("redundancy", "shared", "activation")
        for point in found.sections[key].figures.get("points", [])
    ]


@pytest.mark.parametrize("inner", [False, True], ids=["whole", "decoder"])
def test_compiled_models_are_refused(inner: bool, tiny_model: Callable) -> None:
    """Their hooks do not run: every rise would be zero."""
    model = tiny_model()
    (model.model if inner else model).compile(backend=lambda graph, inputs: graph.forward)
    with pytest.raises(ValueError, match=r"as a? ?modules?, so that"):
        measure(model)


def test_offloaded_models_have_no_weights_to_compare(tiny_model: Callable, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    expected = measure(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    parts = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places = parts | {f"model.layers.{layer}": ("cpu", "disk", "disk")[layer] for layer in range(3)}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path)
    found = measure(model)
    assert "is offloaded" in found.sections["weights"].empty
    assert rises(found) == pytest.approx(rises(expected), abs=1e-6)
    assert found.sections["outputs"].figures == expected.sections["outputs"].figures


def test_adapters_take_part_and_are_not_compared(tiny_model: Callable) -> None:
    base = tiny_model()
    expected = measure(base)
    model = get_peft_model(tiny_model(), expert_lora_config(base, r=2))
    assert rises(measure(model)) == pytest.approx(rises(expected), abs=1e-6)  # its factors B are zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    found = measure(model)
    assert found.loss != pytest.approx(expected.loss, abs=1e-3)
    assert found.sections["weights"].figures == expected.sections["weights"].figures
    assert found.sections["weights"].notes == ("Adapters are left out: these are the base's.",)


def test_gates_that_peft_trains_choose_again(tiny_model: Callable) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], r=2))
    assert rises(measure(model)) == pytest.approx(rises(measure(tiny_model())), abs=1e-6)


def test_what_choosing_again_changes_by_itself_is_said() -> None:
    """A block that weighs its choices once more after the gate: no rule of a gate has that in it."""
    model = family("qwen3_moe").eval()
    layer = model.model.layers[1].mlp
    layer.experts.register_forward_pre_hook(lambda module, args: (args[0], args[1], args[2] * 3.0))
    notes = measure(model).sections["redundancy"].notes
    assert any("Choosing the same number of experts again moves the loss by" in note for note in notes)
    assert not any("Choosing" in note for note in measure(family("qwen3_moe").eval()).sections["redundancy"].notes)


def test_bfloat16_is_near_float32(tiny_model: Callable) -> None:
    found, expected = measure(tiny_model().bfloat16()), measure(tiny_model())
    assert found.loss == pytest.approx(expected.loss, rel=0.02)
    assert found.sections["weights"].figures["layers"][0]["mean"] == pytest.approx(
        expected.sections["weights"].figures["layers"][0]["mean"], abs=1e-3
    )


def test_progress_is_of_all_that_is_read(tiny_model: Callable) -> None:
    told: list[tuple[int, int]] = []
    measure(tiny_model(), single_experts=1000, progress=lambda done, total: told.append((done, total)))
    assert len({total for _, total in told}) == 1 and all(a <= b for (a, _), (b, _) in pairwise(told))
    tokens = sum(batch.numel() for batch in TEXT[""])
    assert told[-1][0] == told[-1][1] and told[-2][0] >= told[-1][1] - tokens  # the last pass makes the outputs
