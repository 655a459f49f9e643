"""DeepSeek-V3.2 and V4 of transformers, trained with this package's experts and routing as with their own.

V3.2 chooses the tokens of its attention by an indexer, under `no_grad`. V4's first MoE layers choose experts by the
ids of the tokens, from a table.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import tiny_model
from peft import get_peft_model
from tolerances import assert_same
from torch import nn
from training import Rows
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_deepseekmoe import (
    LoadBalancingCallback,
    add_auxiliary_loss,
    expert_lora_config,
    route_native_gates,
    take_router_load,
    track_router_load,
)
from modeling_deepseekmoe.balancing.gates import find_biased_gates
from modeling_deepseekmoe.families.moe_layers import find_moe_layers

pytest.importorskip("transformers.models.deepseek_v32")
pytest.importorskip("transformers.models.deepseek_v4")

STEPS = 5
# More tokens than V3.2's indexer keeps (8), and than V4's compressors need.
IDS = torch.randint(3, 40, (8, 20), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(20)[None] < torch.tensor([20, 15, 18, 20, 9, 20, 17, 12])[:, None]).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


def v32() -> nn.Module:
    return tiny_model("deepseek_v32").train()


def v4() -> nn.Module:
    """Two layers of each kind. The clamp of the experts is in use, and so is the table, which begins as zeros."""
    model = tiny_model(
        "deepseek_v4", mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"], swiglu_limit=0.5,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    )  # fmt: skip
    for index, layer in enumerate(model.model.layers[:2]):
        table = layer.mlp.gate.tid2eid
        generator = torch.Generator().manual_seed(index)
        table.copy_(torch.rand(len(table), 8, generator=generator).topk(table.shape[1]).indices)
    return model.train()


def faster(model: nn.Module) -> nn.Module:
    """The same model with this package's experts and routing."""
    model.set_experts_implementation("deepseekmoe")
    assert route_native_gates(model) == len(find_moe_layers(model))
    return model


def slower(model: nn.Module) -> nn.Module:
    model.set_experts_implementation("eager")
    return model


def indexers(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "indexer" in name}


class Counts(TrainerCallback):
    """Keeps what the balancing callback, which is called before, has counted in every step."""

    def __init__(self, balancing: LoadBalancingCallback) -> None:
        self.balancing, self.found = balancing, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.found.append(self.balancing.stats.to_dict()["tokens_per_expert"])


def train(model: nn.Module, folder: Path) -> tuple[Trainer, list[Any]]:
    balancing = LoadBalancingCallback(1e-2)
    counts = Counts(balancing)
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=1.0, seed=7, learning_rate=0.1,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(**BATCH), callbacks=[balancing, counts])
    trainer.train()
    return trainer, counts.found


def assert_same_training(found: nn.Module, expected: nn.Module, folder: Path) -> list[dict[str, float]]:
    """That two models train alike: losses, balance losses, counts, biases and parameters."""
    (one, counts), (other, wanted) = (train(model, folder) for model in (found, expected))
    assert counts == wanted and len(counts) == STEPS
    logs = one.state.log_history[:STEPS]
    for log, wanted_log in zip(logs, other.state.log_history, strict=False):
        for name in ("loss", "aux_loss", "router/max_violation_batch", "router/bias_norm"):
            assert abs(log[name] - wanted_log[name]) < 2e-4 * (1 + abs(wanted_log[name])), name
    wanted_state = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert_same(tensor.float(), wanted_state[name].float(), name)
    biases = [[gate.bias for gate in find_biased_gates(model)] for model in (found, expected)]
    assert all(map(torch.equal, *biases)) and all(bias.abs().max() > 0.02 for bias in biases[0])
    return logs


@pytest.mark.parametrize("what", ["full", "lora"])
def test_v32_trains_as_its_own_classes_do(what: str, tmp_path: Path) -> None:
    models = [faster(v32()), slower(v32())]
    before = {name: p.detach().clone() for name, p in indexers(models[0]).items()}
    for index, model in enumerate(models):
        add_auxiliary_loss(model, expert=0.05, sequence=0.05, z=1e-3)
        if what == "lora":
            torch.manual_seed(3)
            targets = ("q_b_proj", "o_proj")
            models[index] = get_peft_model(
                model, expert_lora_config(model, r=4, target_modules=targets, train_router=True)
            )
    logs = assert_same_training(*models, tmp_path)
    assert logs[-1]["loss"] < 0.97 * logs[0]["loss"], [log["loss"] for log in logs]
    after = {name.replace("base_model.model.", ""): p for name, p in indexers(models[0]).items()}
    assert before.keys() == after.keys() and len(before) == 20
    assert all(torch.equal(before[name], parameter) for name, parameter in after.items())
    assert all(parameter.grad is None for parameter in after.values())


@pytest.mark.parametrize("make", [v32, v4])
@pytest.mark.parametrize("targets", [("self_attn",), "all-linear"])
def test_indexers_get_no_adapters(make: Any, targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    """No loss would train them."""
    with caplog.at_level("WARNING"):
        config = expert_lora_config(make(), r=2, target_modules=targets)
    adapted = get_peft_model(make(), config)
    adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = {name: p.grad is not None for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(gradients.values()) and any("self_attn" in name for name in gradients)
    assert not any("indexer" in name for name in gradients)
    assert any("indexer.wq_b" in name for name, _ in v32().named_parameters())


def test_a_map_of_another_kind_alone_is_refused() -> None:
    reason = "target_modules: 'o_a_proj' is not allowed: it names .*a DeepseekV4GroupedLinear, which is no plain"
    with pytest.raises(ValueError, match=reason):
        expert_lora_config(v4(), r=2, target_modules="o_a_proj")


def test_an_indexer_alone_is_refused() -> None:
    reason = (
        r"target_modules: 'wq_b' is not allowed: it names model\.layers\.0\.self_attn\.indexer\.wq_b .of an indexer"
    )
    with pytest.raises(ValueError, match=reason):
        expert_lora_config(v32(), r=2, target_modules=("q_b_proj", "wq_b"))


def test_an_end_that_indexers_share() -> None:
    config = expert_lora_config(v4(), r=2, target_modules=("kv_proj",))
    names = [name for name, module in v4().named_modules() if name.endswith("kv_proj")]
    assert sorted(config.target_modules) == sorted(name for name in names if "indexer" not in name) != sorted(names)


@pytest.mark.parametrize("target", ["kv_proj", "all-linear", "self_attn"])
def test_full_names_keep_to_the_layers(target: str) -> None:
    config = expert_lora_config(v4(), r=2, target_modules=target, layers_to_transform=[1])
    adapted = [name for name, _ in get_peft_model(v4(), config).named_parameters() if "lora_A" in name]
    assert any("self_attn" in name for name in adapted) and all(".layers.1." in name for name in adapted)


def test_v32_indexer_decides_what_is_attended_to() -> None:
    """So the indexer is in use in these tests."""
    model = v32().eval()
    logits = model(IDS, use_cache=False).logits
    with torch.no_grad():
        for parameter in indexers(model).values():
            parameter.copy_(parameter.flip(0))
    assert (model(IDS, use_cache=False).logits - logits).abs().max() > 1e-2


def test_v4_trains_as_its_own_classes_do_and_is_read_again(tmp_path: Path) -> None:
    models = [faster(v4()), slower(v4())]
    begin = copy.deepcopy(models[1].state_dict())
    for model in models:
        add_auxiliary_loss(model, expert=0.05, sequence=0.05, z=1e-3)
    logs = assert_same_training(*models, tmp_path)
    assert logs[-1]["loss"] < 0.97 * logs[0]["loss"], [log["loss"] for log in logs]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, begin[name]) == ("tid2eid" in name or ".indexer." in name), name
    assert len(find_biased_gates(models[0])) == 2
    add_auxiliary_loss(models[0])
    models[0].save_pretrained(tmp_path / "saved")
    loaded = [type(v4()).from_pretrained(tmp_path / "saved", dtype=torch.float32) for _ in range(2)]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(loaded[0].state_dict()[name], tensor), name
    wanted = slower(loaded[0]).eval()(**BATCH, use_cache=False)
    for model in (models[0], faster(loaded[1])):
        found = model.eval()(**BATCH, use_cache=False)
        assert_same(found.logits, wanted.logits)
        assert_same(found.loss, wanted.loss)
    before = wanted.logits
    for gate in find_biased_gates(loaded[0]):
        gate.bias.zero_()
    assert (loaded[0](**BATCH, use_cache=False).logits - before).abs().max() > 1e-2  # the bias that was moved chooses


@pytest.mark.parametrize("make", [faster, slower])
def test_v4_counts_and_clamps_both_kinds_of_layers(make: Any) -> None:
    """Counts of a hash layer are those of its table; the experts of every layer clamp."""
    model = make(v4())
    track_router_load(model)
    model(**BATCH, use_cache=False)
    counts = take_router_load(model).tokens_per_expert
    real = IDS[MASK.bool()]
    for index, layer in enumerate(model.model.layers[:2]):
        assert torch.equal(counts[index], layer.mlp.gate.tid2eid[real].flatten().bincount(minlength=8))
    assert counts.sum(1).tolist() == [3 * len(real)] * 4
    logits = model(**BATCH, use_cache=False).logits
    for layer in model.model.layers:
        layer.mlp.experts.limit = 10.0
        changed = model(**BATCH, use_cache=False).logits
        assert (changed - logits).abs().max() > 1e-3
        logits = changed
