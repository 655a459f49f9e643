"""What works over experts as they are works over quantised ones: adapters, ESFT, balancing, Trainer, two processes."""

import copy
from pathlib import Path

import pytest
import torch
from fresh_process import check
from packaging import version
from paths import ROOT
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantized_models import FOUR_BITS, IDS, KINDS, decoded, load, quantized_modules, write
from torch import nn
from training import Rows, arguments, losses, reference_text
from transformers import Trainer

from modeling_deepseekmoe import (
    expert_lora_config,
    load_esft,
    max_violation,
    merge_esft,
    optimize_expert_lora,
    prepare_esft,
    save_esft,
    score_experts,
    select_experts,
    take_router_load,
    track_router_load,
)
from modeling_deepseekmoe.esft.layer import SelectedExperts

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("base"))


def adapted(model: nn.Module, **fields: object) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(model, expert_lora_config(model, **{"r": 4, "init_lora_weights": False, **fields}))


def logits(model: nn.Module, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def assert_near(found: torch.Tensor, wanted: torch.Tensor, part: float = 1e-5) -> None:
    assert (found - wanted).abs().max() <= part * wanted.abs().max()


def pair_of_models(folder: Path, kind: str) -> list[PeftModel]:
    """Over quantised experts, and over what they decode to, with three adapters."""
    models = []
    for model in (load(folder, kind), decoded(folder, kind)):
        made = optimize_expert_lora(adapted(model))
        made.add_adapter("down", expert_lora_config(model, r=2, projections=("down",), init_lora_weights=False))
        made.add_adapter("chosen", expert_lora_config(model, experts={2: [1, 4]}, lora_dropout=0.2))
        models.append(made.eval())
    factors = dict(models[0].named_parameters())
    with torch.no_grad():
        for name, parameter in models[1].named_parameters():
            if "lora_" in name:
                parameter.copy_(factors[name])
    return models


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters(folder: Path, kind: str) -> None:
    """One by one, two at once, a batch with others in each row, combined, and none."""
    quantised, plain = pair_of_models(folder, kind)
    for name in ("default", "down", "chosen", ["default", "down"]):
        for model in (quantised, plain):
            model.base_model.set_adapter(name)
        assert_near(logits(quantised), logits(plain))
    for model in (quantised, plain):
        model.set_adapter("default")
        model.add_weighted_adapter(["default", "chosen"], [0.5, 2.0], "both", combination_type="cat")
    names = ["down", "default"]
    assert_near(logits(quantised, adapter_names=names), logits(plain, adapter_names=names))
    for model in (quantised, plain):
        model.set_adapter("both")
    assert_near(logits(quantised), logits(plain))
    with quantised.disable_adapter(), plain.disable_adapter():
        assert_near(logits(quantised), logits(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_and_recomputed_layers(folder: Path, reentrant: bool) -> None:
    """The same gradients with and without recomputing, whose dropout is the same."""
    gradients = []
    for recomputed in (False, True):
        model = adapted(load(folder, FOUR_BITS), lora_dropout=0.3).train()
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 8
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_an_adapter_is_saved_and_read_by_plain_peft(folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder, FOUR_BITS)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(folder, FOUR_BITS), tmp_path / "adapter").eval()
    for kind, error in (
        ("fp8", ValueError),
        (FOUR_BITS, RuntimeError),
    ):  # PEFT's own is the first for fewer bytes a row
        with pytest.raises(error, match=r"call optimize_expert_lora\(model\)|must match the existing size"):
            logits(PeftModel.from_pretrained(load(folder, kind), tmp_path / "adapter"))
    assert torch.equal(logits(optimize_expert_lora(loaded)), logits(model))
    over_plain = PeftModel.from_pretrained(decoded(folder, FOUR_BITS), tmp_path / "adapter").eval()
    assert_near(logits(model), logits(over_plain))
    stock = get_peft_model(load(folder, FOUR_BITS), LoraConfig(target_modules=[], target_parameters=STACKS))
    assert stock.base_model.model.model.layers[1].mlp.experts.lora_A["default"].weight.shape == (64, 128)


def test_a_copy_of_a_model_is_adapted_as_well(folder: Path) -> None:
    model = load(folder, FOUR_BITS)
    assert torch.equal(logits(adapted(copy.deepcopy(model)).eval()), logits(adapted(model).eval()))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_in_memory_is_refused(folder: Path, call: str) -> None:
    model = adapted(load(folder, FOUR_BITS))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="Merging is not allowed into quantised experts in memory: save the adapter"):
        getattr(model, call)()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_preparation_by_peft(folder: Path) -> None:
    model = prepare_model_for_kbit_training(load(folder, FOUR_BITS, torch.bfloat16))
    assert model.model.norm.weight.dtype == torch.float32 and model.is_gradient_checkpointing
    model = adapted(model).train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert torch.isfinite(loss) and sum(p.grad is not None for p in model.parameters()) == 8


def test_generation(folder: Path) -> None:
    """Greedy, of a batch padded on the left, with and without a cache."""
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    ids = IDS.masked_fill(mask == 0, 0)
    for kind in KINDS:
        quantised, plain = load(folder, kind), decoded(folder, kind)
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        found = quantised.generate(ids, **options)
        assert found.shape == (2, 17)
        assert torch.equal(found, plain.generate(ids, **options))
        assert torch.equal(found, quantised.generate(ids, use_cache=False, **options))


def test_counts_and_scores(folder: Path) -> None:
    quantised, plain = load(folder, "fp8"), decoded(folder, "fp8")
    counts = []
    for model in (quantised, plain):
        track_router_load(model)
        model.train()(IDS)
        counts.append(take_router_load(model).tokens_per_expert)
    assert torch.equal(*counts) and max_violation(counts[0]).max() > 0
    scores = [score_experts(model, [{"input_ids": IDS}], method="token") for model in (quantised, plain)]
    assert scores[0].keys() == scores[1].keys()
    assert all(torch.equal(torch.as_tensor(scores[0][key]), torch.as_tensor(scores[1][key])) for key in scores[0])


@pytest.mark.parametrize("kind", KINDS)
def test_esft(folder: Path, tmp_path: Path, kind: str) -> None:
    """The selected experts are copies that train; the rest stays as it is. They are saved, loaded and applied."""
    model, plain = load(folder, kind), decoded(folder, kind)
    scores = score_experts(model, [{"input_ids": IDS}], method="gate")
    selection = select_experts(scores, 0.3)
    codes = {name: p.clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    for one in (model, plain):
        prepare_esft(one, selection)
        one.train()
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            one(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = [m for m in model.modules() if isinstance(m, SelectedExperts)]
    assert len(trained) == 2 and all(m.selected_down_proj.dtype == torch.float32 for m in trained)
    assert all(torch.equal(p, codes[name]) for name, p in model.named_parameters() if name in codes)
    assert_near(logits(model.eval()), logits(plain.eval()), 1e-4)
    with pytest.raises(ValueError, match="merge_esft is not allowed over quantised experts: call save_esft"):
        merge_esft(model)
    save_esft(model, tmp_path / "esft")
    fresh = load(folder, kind)
    with pytest.raises(
        ValueError, match="is not allowed for a model with quantised experts on which it is not selected"
    ):
        load_esft(fresh, tmp_path / "esft")
    prepare_esft(fresh, tmp_path / "esft" / "esft.json")
    load_esft(fresh, tmp_path / "esft")
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))


@pytest.mark.parametrize(("what", "name"), [("lora", ""), ("esft", ""), ("esft", "qwen3_moe")])
def test_trainer_resumes_bit_for_bit(folder: Path, tmp_path: Path, what: str, name: str) -> None:
    """Models of this family, which read official names themselves, and transformers' own, which are taught to."""
    rows, folder = reference_text(16, 12), write(tmp_path / "native", name) if name else folder

    def run(**kwargs: object) -> tuple[nn.Module, list[float]]:
        model = load(folder, FOUR_BITS)
        if what == "lora":
            model = adapted(model, lora_dropout=0.1)
        else:
            prepare_esft(model, {1: [0, 3, 5], 2: [2]})
        trainer = Trainer(
            model,
            arguments(tmp_path / "run", max_steps=4, save_steps=2, save_strategy="steps"),
            train_dataset=Rows(input_ids=rows, labels=rows),
        )
        trainer.train(**kwargs)
        return model, losses(trainer)

    whole, first = run()
    resumed, second = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert first == second and len(first) == 4 and first[-1] < first[0]
    states = whole.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_trainer_refuses_a_model_of_which_nothing_is_trained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(load(folder, "mxfp4"), arguments(tmp_path))


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path, tmp_path: Path) -> None:
    """Ranks with rows of their own, under DDP and FSDP2, have the gradients of one process with all rows."""
    check(str(ROOT / "tests" / "scripts" / "quantized_training.py"), folder, tmp_path / "found.pt", ranks=2)
    of_both = torch.load(tmp_path / "found.pt")
    model = adapted(load(folder, "mxfp4"), r=2)
    model(IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    takes_integers = version.parse(torch.__version__) >= version.parse("2.13")  # FSDP2
    assert list(of_both) == (["ddp", "fsdp2"] if takes_integers else ["ddp"]) and len(quantized_modules(model)) == 2
    for found in of_both.values():
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert_near(found[name], gradient, 1e-4)
