"""The correction of quantised experts: exact at full rank, best at any rank, frozen, saved, and a part of the base."""

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from quantized_models import FOUR_BITS, IDS, KINDS, base, load, quantized_modules, write
from safetensors.torch import load_file
from tolerances import SAME_COMPUTATION
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_deepseekmoe import (
    correct_rounding,
    expert_lora_config,
    load_correction,
    prepare_esft,
    save_correction,
)
from modeling_deepseekmoe.experts import run_experts
from modeling_deepseekmoe.quantization.correction import _Inputs, low_rank

RANKS = 192  # of the widest matrix: everything is given back


@torch.no_grad()
def logits(model: nn.Module, **options: object) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False, **options).logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def corrected(folder: Path, kind: str = FOUR_BITS, r: int = 8, **options: object) -> nn.Module:
    model = load(folder, kind, **options)
    correct_rounding(model, folder, [IDS], r=r)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "whole")


@pytest.mark.parametrize("sizes", [(48, 80), (80, 48), (6, 80)])
def test_it_is_the_best_of_its_rank(sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, columns = sizes
    scales, matrix = torch.linspace(0.0, 4.0, columns).exp(), torch.randn(sizes)
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
    expected, rounded = logits(base(name)), logits(load(folder, kind))
    model = corrected(folder, kind, RANKS)
    assert error(rounded, expected) > 1e-3 > 1e-4 > error(logits(model), expected)
    assert not any(one.requires_grad for module in quantized_modules(model).values() for one in module.parameters())
    assert error(logits(copy.deepcopy(model)), expected) < 1e-4
    assert error(logits(model.dequantize(torch.float32)), expected) < 1e-4
    assert not any("correction" in name for name, _ in model.named_parameters())


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
    found.append(error(logits(corrected(tmp_path / "whole")), expected))
    monkeypatch.setattr(
        _Inputs, "scales", lambda self: {name: torch.ones_like(sums) for name, sums in self.sums.items()}
    )
    found.append(error(logits(corrected(tmp_path / "whole")), expected))
    found.append(error(logits(load(tmp_path / "whole", FOUR_BITS)), expected))
    assert found[0] < 0.7 * found[1] and found[1] < found[2]


def test_inputs_that_are_zero_or_few_give_no_numbers_that_are_none(folder: Path) -> None:
    model = load(folder, FOUR_BITS)
    with torch.no_grad():  # no input of this layer is anything
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    correct_rounding(model, folder, [IDS[:1, :2]], r=4)
    for name, one in model.named_parameters():
        assert "correction" not in name or torch.isfinite(one).all(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("before", [True, False])
def test_adapters_are_trained_beside_it(before: bool, dropout: float, folder: Path) -> None:
    """The gradients are those over the same weights in float32, whether the adapter or the correction is first."""
    torch.manual_seed(2)
    model = load(folder, FOUR_BITS)
    options = {"r": 4, "lora_dropout": dropout, "target_modules": ("self_attn",), "train_router": bool(dropout)}
    if before:
        correct_rounding(model, folder, [IDS], r=8)
    adapted = get_peft_model(model, expert_lora_config(model, **options))
    if not before:
        correct_rounding(adapted, folder, [IDS], r=8)
    plain = corrected(folder).dequantize(torch.float32)
    reference = get_peft_model(plain, expert_lora_config(plain, **options))
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if "lora_" in name:
                one.copy_(torch.randn_like(one) * 0.1)
    values = {name: one for name, one in adapted.state_dict().items() if "lora_" in name}
    assert not reference.load_state_dict(values, strict=False).unexpected_keys
    gradients = []
    for one in (adapted, reference):
        torch.manual_seed(5)
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    if not dropout:  # else the two draw other numbers
        for name, gradient in gradients[0].items():
            assert error(gradient, gradients[1][name]) < 1e-3 or gradient.norm() < 1e-6, name
        assert error(logits(adapted), logits(reference)) < SAME_COMPUTATION
        rows = {"adapter_names": ["default", "__base__"]}
        assert error(logits(adapted, **rows), logits(reference, **rows)) < SAME_COMPUTATION
    with adapted.disable_adapter(), reference.disable_adapter():  # it is a part of the base
        assert error(logits(adapted), logits(reference)) < SAME_COMPUTATION


def test_it_is_in_use_everywhere(folder: Path) -> None:
    """Compiled, recomputed, generating, in grouped products; and it leaves random numbers alone."""
    torch.manual_seed(7)
    expected_numbers = torch.rand(3)
    model = load(folder, FOUR_BITS)
    torch.manual_seed(7)
    correct_rounding(model, folder, [IDS], r=8)
    assert torch.equal(torch.rand(3), expected_numbers)
    plain, experts = corrected(folder).dequantize(torch.float32), model.model.layers[1].mlp.experts
    hidden, ids = torch.randn(6, 192), torch.rand(6, 8).topk(3).indices
    weights = torch.rand(6, 3)
    wanted = plain.model.layers[1].mlp.experts(hidden, ids, weights).detach()
    for backend in ("loop", "grouped"):
        assert error(run_experts(experts, hidden, ids, weights, backend=backend).detach(), wanted) < SAME_COMPUTATION
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert error(compiled(hidden, ids, weights).detach(), wanted) < SAME_COMPUTATION
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))
    gradients = []
    for one in (model, plain):
        one.gradient_checkpointing_enable({"use_reentrant": False})
        one.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(one.model.embed_tokens.weight.grad)
    assert error(*gradients) < 1e-4


def test_experts_of_esft_begin_with_it(folder: Path) -> None:
    model = corrected(folder, r=RANKS)
    prepare_esft(model, {1: [0, 3], 2: [1]})
    assert error(logits(model), logits(base())) < 1e-4
    rounded = load(folder, FOUR_BITS)
    prepare_esft(rounded, {1: [0, 3], 2: [1]})
    with pytest.raises(ValueError, match="Correct it before prepare_esft"):
        correct_rounding(rounded, folder, [IDS])


def test_it_is_saved_and_loaded_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = corrected(folder), []
    file = tmp_path / "correction.safetensors"
    save_correction(model, file)
    monkeypatch.setattr("modeling_deepseekmoe.quantization.loading.logger.warning", said.append)
    model.save_pretrained(tmp_path / "rounded")
    assert said == ["The correction of the experts is not in these files: save_correction(model, file) writes it."]
    again = load(tmp_path / "rounded")
    assert error(logits(again), logits(model)) > 1e-3
    load_correction(again, file)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="its experts are corrected already"):
        load_correction(again, file)
    other = "fp8" if FOUR_BITS != "fp8" else "mxfp4"
    with pytest.raises(ValueError, match=f"it corrects experts in '{FOUR_BITS}', and the model's are in '{other}'"):
        load_correction(load(folder, other), file)
    with pytest.raises(ValueError, match=r"do not correct the same layers \(model.layers.1.mlp.experts\)"):
        load_correction(load(folder, FOUR_BITS, skip_layers=[1]), file)
    torch.manual_seed(1)
    stranger = base()
    with torch.no_grad():
        stranger.model.layers[1].mlp.experts.gate_up_proj[5].mul_(2)
    stranger.save_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match=r"other weights than model.layers.1.mlp.experts.gate_up_proj"):
        load_correction(load(tmp_path / "stranger", FOUR_BITS), file)
    other_file = tmp_path / "whole" / "model.safetensors"
    with pytest.raises(ValueError, match="save_correction has not written it"):
        load_correction(load(folder, FOUR_BITS), other_file)
    with pytest.raises(ValueError, match="its experts have no correction"):
        save_correction(load(folder, FOUR_BITS), tmp_path / "none.safetensors")
    assert not list(tmp_path.glob("none*")) and not list(tmp_path.glob("*.unfinished"))


def test_it_has_the_dtype_of_the_products(folder: Path, tmp_path: Path) -> None:
    model = load(folder, FOUR_BITS, torch.bfloat16)
    correct_rounding(model, folder, [IDS], r=4)
    save_correction(model, tmp_path / "correction.safetensors")
    stored = load_file(tmp_path / "correction.safetensors")
    assert {one.dtype for name, one in stored.items() if "_correction_" in name} == {torch.bfloat16}
    rounded = error(logits(load(folder, FOUR_BITS, torch.bfloat16)), logits(base()))
    correct = load(folder, FOUR_BITS, torch.bfloat16)
    correct_rounding(correct, folder, [IDS], r=RANKS)
    assert error(logits(correct), logits(base())) < 0.5 * rounded


def test_layers_that_are_not_rounded_get_none(folder: Path) -> None:
    model = corrected(folder, r=RANKS, skip_layers=[1])
    names = [name for name, _ in model.named_parameters() if "correction" in name]
    assert names and all(".layers.2." in name for name in names)
    assert error(logits(model), logits(base())) < 1e-4


def test_mistakes_leave_the_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = load(folder, FOUR_BITS)
    model.save_pretrained(tmp_path / "rounded")
    write(tmp_path / "shallow", num_hidden_layers=2)
    write(tmp_path / "narrow", moe_intermediate_size=64)
    other = base()
    with torch.no_grad():
        other.model.layers[2].mlp.experts.down_proj.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    for bad, arguments, message in (
        (base(), (folder, [IDS]), "has no quantised experts"),
        (model, (tmp_path / "rounded", [IDS]), f"in '{FOUR_BITS}', as the model does"),
        (model, (tmp_path / "shallow", [IDS]), "it has no model.layers.2.mlp.experts.0.gate_proj.weight"),
        (model, (tmp_path / "narrow", [IDS]), r"has shape \(64, 192\), and the model's \(128, 192\)"),
        (model, (tmp_path / "other", [IDS]), "is off by 200%, so that the model's was made of other weights"),
        (model, (folder, []), "batches is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            correct_rounding(bad, *arguments)
        assert not any("correction" in name for name, _ in bad.named_parameters())
    with pytest.raises(ValueError, match="r=0 is not allowed"):
        correct_rounding(model, folder, [IDS], r=0)
    with pytest.raises(OSError, match="is no folder"):
        correct_rounding(model, tmp_path / "nowhere", [IDS])
    correct_rounding(model, folder, [IDS], r=4)
    with pytest.raises(ValueError, match="its experts are corrected already"):
        correct_rounding(model, folder, [IDS], r=4)


def test_trainer_goes_on_over_it(folder: Path, tmp_path: Path) -> None:
    """A run that is resumed ends with the same adapter as one that is not."""
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8

    def train(output: Path, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        arguments = TrainingArguments(
            str(output), max_steps=steps, save_steps=2, per_device_train_batch_size=1, report_to="none",
            learning_rate=0.01, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        model = corrected(folder)
        torch.manual_seed(2)
        adapted = get_peft_model(model, expert_lora_config(model, r=4))
        Trainer(adapted, arguments, train_dataset=rows).train(resume_from_checkpoint=resume or None)
        return {name: one.detach().clone() for name, one in adapted.named_parameters() if "lora_" in name}

    expected = train(tmp_path / "once", 4)
    train(tmp_path / "twice", 2)
    found = train(tmp_path / "twice", 4, resume=True)
    for name, one in expected.items():
        assert torch.equal(found[name], one), name
