"""The frozen adapter that gives back what rounding took: exact at full rank, best at any rank, frozen and saved."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from quantized_models import FOUR_BITS, IDS, KINDS, base, load, write
from tolerances import SAME_COMPUTATION
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_deepseekmoe import add_rounding_adapter, expert_lora_config, optimize_expert_lora
from modeling_deepseekmoe.conversion import convert, merge_adapter
from modeling_deepseekmoe.quantization.rounding import low_rank

RANKS = 192  # of the widest matrix: the adapter gives back everything


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("sizes", [(48, 80), (80, 48), (6, 80)])
def test_it_is_the_best_of_its_rank(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, columns = sizes
    scales = torch.linspace(0.0, 4.0, columns).exp()
    matrix = torch.randn(sizes)
    factor_b, factor_a = low_rank(matrix, scales, 8)
    assert factor_b.shape == (rows, 8) and factor_a.shape == (8, columns)
    left, values, right = torch.linalg.svd((matrix * scales).double(), full_matrices=False)
    best = (left[:, :8] * values[:8]) @ right[:8]
    off = (matrix * scales - factor_b @ factor_a * scales).norm()
    least = ((matrix * scales).double() - best).norm()
    assert off <= 1.001 * least + 1e-6 * (matrix * scales).norm()


@pytest.mark.parametrize("name", ["deepseekmoe", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_the_model_is_the_one_before(name: str, kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "whole", name)
    expected, model = logits(base(name)), load(folder, kind)
    rounded = logits(model)
    adapted = add_rounding_adapter(model, folder, [IDS], r=RANKS)
    assert error(rounded, expected) > 1e-3 > 1e-4 > error(logits(adapted), expected)
    corrected = logits(adapted)
    with adapted.disable_adapter():  # it is part of the base
        assert torch.equal(logits(adapted), corrected)


def test_scales_of_the_inputs_make_it_better_than_the_plain_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With inputs of very different sizes, as trained models have them."""
    torch.manual_seed(0)
    whole = base()
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.post_attention_layernorm.weight.copy_(torch.randn(192).mul(1.5).exp())
    whole.save_pretrained(tmp_path / "whole")
    expected, found = logits(whole), []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(
                "modeling_deepseekmoe.quantization.rounding._Inputs.scales",
                lambda self: {name: torch.ones_like(sums) for name, sums in self.sums.items()},
            )
        adapted = add_rounding_adapter(load(tmp_path / "whole", FOUR_BITS), tmp_path / "whole", [IDS], r=8)
        found.append(error(logits(adapted), expected))
    rounded = error(logits(load(tmp_path / "whole", FOUR_BITS)), expected)
    assert found[0] < 0.7 * found[1] and found[1] < rounded


def adapted_beside(folder: Path, **options: object) -> PeftModel:
    model = load(folder, FOUR_BITS)
    torch.manual_seed(2)
    adapted = get_peft_model(model, expert_lora_config(model, r=4, **options))
    return add_rounding_adapter(adapted, folder, [IDS], r=8)


@pytest.mark.parametrize("options", [{}, {"target_modules": ("self_attn",), "train_router": True}])
def test_it_is_frozen_beside_the_one_that_is_trained(options: dict, tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    model = load(folder, FOUR_BITS)
    trained = {
        name for name, one in get_peft_model(model, expert_lora_config(model, r=4, **options)).named_parameters()
        if one.requires_grad
    }  # fmt: skip
    adapted = adapted_beside(folder, **options)
    assert {name for name, one in adapted.named_parameters() if one.requires_grad} == trained
    assert adapted.active_adapters == ["default"]
    before = {name: one.detach().clone() for name, one in adapted.named_parameters()}
    optimizer = torch.optim.SGD([one for one in adapted.parameters() if one.requires_grad], 0.1)
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = {name for name, one in adapted.named_parameters() if not torch.equal(one, before[name])}
    assert changed and changed <= trained


def test_it_is_saved_and_loaded_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    adapted = adapted_beside(folder)
    for name, one in adapted.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(one, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    again = optimize_expert_lora(PeftModel.from_pretrained(load(folder, FOUR_BITS), tmp_path / "adapter"))
    again.load_adapter(tmp_path / "adapter" / "rounding", "rounding")
    assert torch.equal(logits(again), logits(adapted))
    with again.disable_adapter(), adapted.disable_adapter():
        assert torch.equal(logits(again), logits(adapted))
    again.delete_adapter("rounding")
    assert error(logits(again), logits(adapted)) > 1e-3


def test_over_whole_weights_it_does_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    adapted_beside(folder).save_pretrained(tmp_path / "adapter")
    whole = optimize_expert_lora(PeftModel.from_pretrained(base(), tmp_path / "adapter"))
    expected = logits(whole)
    whole.load_adapter(tmp_path / "adapter" / "rounding", "rounding")
    assert torch.equal(logits(whole), expected)


def test_rows_with_adapters_of_their_own_have_it_too(tmp_path: Path) -> None:
    adapted = adapted_beside(write(tmp_path / "whole"))
    for name, one in adapted.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(one, std=0.1)
    expected = [logits(adapted)[:1]]
    with adapted.disable_adapter():
        expected.append(logits(adapted)[1:])
    with torch.no_grad():
        found = adapted.eval()(input_ids=IDS, use_cache=False, adapter_names=["default", "__base__"]).logits
    assert error(found, torch.cat(expected)) < SAME_COMPUTATION


def test_layers_that_are_not_rounded_get_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    adapted = add_rounding_adapter(load(folder, FOUR_BITS, skip_layers=[1]), folder, [IDS], r=RANKS)
    names = [name for name, _ in adapted.named_parameters() if "lora_A.rounding" in name]
    assert names and all(".layers.2." in name for name in names)
    assert error(logits(adapted), logits(base())) < 1e-4


def test_mistakes_leave_the_model_as_it_was(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    model = load(folder, FOUR_BITS)
    model.save_pretrained(tmp_path / "rounded")
    write(tmp_path / "shallow", num_hidden_layers=2)
    adapted = get_peft_model(load(folder, FOUR_BITS), expert_lora_config(model, r=4))
    for bad, arguments, message in (
        (base(), (folder, [IDS]), "has no quantised experts"),
        (model, (tmp_path / "rounded", [IDS]), f"in '{FOUR_BITS}', as the model does"),
        (model, (tmp_path / "shallow", [IDS]), "it has no model.layers.2.mlp.experts.0.gate_proj.weight"),
        (model, (folder, []), "batches is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            add_rounding_adapter(bad, *arguments)
        assert not any("lora_" in name for name, _ in bad.named_parameters())
    add_rounding_adapter(adapted, folder, [IDS])
    with pytest.raises(ValueError, match="it has an adapter 'rounding'"):
        add_rounding_adapter(adapted, folder, [IDS])
    with pytest.raises(OSError, match="is no folder"):
        add_rounding_adapter(model, tmp_path / "nowhere", [IDS])


def test_trainer_goes_on_with_it(tmp_path: Path) -> None:
    """A run that is resumed ends with the same adapter as one that is not."""
    folder = write(tmp_path / "whole")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8

    def train(output: Path, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            str(output), max_steps=steps, save_steps=2, per_device_train_batch_size=1, report_to="none",
            learning_rate=0.01, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        adapted = adapted_beside(folder)
        Trainer(adapted, arguments, train_dataset=rows).train(resume_from_checkpoint=resume or None)
        return {name: one.detach().clone() for name, one in adapted.named_parameters() if "lora_" in name}

    expected = train(tmp_path / "once", 4)
    train(tmp_path / "twice", 2)
    found = train(tmp_path / "twice", 4, resume=True)
    for name, one in expected.items():
        assert torch.equal(found[name], one), name


def test_it_is_not_merged_into_whole_weights(tmp_path: Path) -> None:
    folder, said = write(tmp_path / "whole"), []
    adapted = adapted_beside(folder)
    for name, one in adapted.named_parameters():
        if "lora_B.default" in name:
            nn.init.normal_(one, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="it gives back what rounding took, and this base is not rounded"):
        merge_adapter(folder, tmp_path / "adapter" / "rounding", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged", report=said.append)
    assert not any("rounding" in line for line in said)
    convert(folder, tmp_path / "rounded", dtype=FOUR_BITS)
    merge_adapter(tmp_path / "rounded", tmp_path / "adapter", tmp_path / "again", dtype="float32", report=said.append)
    assert any("The adapter's rounding is not merged" in line for line in said)
