"""The tools on transformers' own families: balancing under every name of a bias, added biases, reports, ESFT."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from other_families import family
from peft import get_peft_model
from tolerances import assert_same
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_deepseekmoe import (
    LoadBalancingCallback,
    add_auxiliary_loss,
    add_balancing_bias,
    expert_lora_config,
    load_esft,
    merge_esft,
    prepare_esft,
    route_native_gates,
    save_esft,
    score_experts,
    take_router_load,
    track_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.analysis.evaluation import trace_routing
from modeling_deepseekmoe.auxiliary_losses import max_violation
from modeling_deepseekmoe.balancing.gates import find_biased_gates
from modeling_deepseekmoe.families.moe_layers import find_moe_layers

IDS = torch.randint(3, 100, (8, 16), generator=torch.Generator().manual_seed(1))
# One of every name and place of a bias.
NAMINGS = ("deepseek_v3", "glm4_moe", "afmoe", "lfm2_moe", "minimax_m2", "ernie4_5_moe")


def skew(model: nn.Module) -> None:
    """Give every gate a few favourites."""
    for gate in find_biased_gates(model):
        with torch.no_grad():
            gate.bias.view(-1)[:3] += 0.4
            for parameter in gate.layer.gate.parameters():
                if not parameter.any():  # AFMoE's gates begin with zeros
                    parameter.normal_(std=0.2)


def violation(model: nn.Module) -> float:
    model(input_ids=IDS, use_cache=False)
    return float(max_violation(take_router_load(model).tokens_per_expert).mean())


@pytest.mark.parametrize("name", [*NAMINGS[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMINGS[3:])])
def test_a_skewed_model_becomes_balanced(name: str) -> None:
    model = family(name).requires_grad_(True)
    skew(model)
    track_router_load(model)
    before = violation(model)
    for _ in range(150):
        for part in IDS.chunk(4):  # accumulation
            model(input_ids=part, use_cache=False)
        update_router_bias(model, 5e-3, "proportional")
    after = violation(model)
    assert before > 0.5 and after < 0.3 * before, (before, after)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2, logging_steps=1,
        disable_tqdm=True, learning_rate=1e-3, **{"max_steps": 4, **more},
    )  # fmt: skip


def data() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        *((name, True) for name in NAMINGS),
        *((NAMINGS[0], other) for other in (None, False)),
        *(pytest.param(name, other, marks=pytest.mark.slow) for name in NAMINGS[1:] for other in (None, False)),
    ],
)
def test_trainer_counts_exactly_and_resumes_bit_for_bit(name: str, checkpointing: bool | None, tmp_path: Path) -> None:
    more: dict[str, Any] = {"gradient_accumulation_steps": 4}
    if checkpointing is not None:
        more |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    model, callback = family(name), LoadBalancingCallback(1e-2)
    trainer = Trainer(model, arguments(tmp_path / "whole", **more), train_dataset=data(), callbacks=[callback])
    trainer.train()
    assert "router/max_violation_global" in trainer.state.log_history[0]
    biases = [gate.bias.clone() for gate in find_biased_gates(model)]
    assert all(bias.abs().max() > 0 for bias in biases)
    again = family(name)
    second = Trainer(
        again, arguments(tmp_path / "whole", **more), train_dataset=data(), callbacks=[LoadBalancingCallback(1e-2)]
    )
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(map(torch.equal, biases, (gate.bias for gate in find_biased_gates(again))))


def test_counts_of_accumulated_batches_are_those_of_one() -> None:
    model = family("qwen3_moe")
    track_router_load(model)
    model(input_ids=IDS, use_cache=False)
    whole = take_router_load(model)
    for part in IDS.chunk(4):
        model(input_ids=part, use_cache=False)
    parts = take_router_load(model)
    assert torch.equal(whole.tokens_per_expert, parts.tokens_per_expert) and parts.tokens == IDS.numel()
    assert whole.tokens_per_expert.sum(dim=1).tolist() == [3 * IDS.numel()] * 4


def test_skipped_tokens_are_a_class_of_their_own() -> None:
    """Zaya gives a skipped token to expert 0, with weight 0."""
    model = family("zaya")
    biases = [gate.bias for gate in find_biased_gates(model)]
    for bias in biases:
        bias.data[-1] = 0.3  # many tokens are skipped
    track_router_load(model)
    model(input_ids=IDS, use_cache=False)
    before = [bias.clone() for bias in biases]
    load = update_router_bias(model, 0.5)
    assert load.tokens_per_expert.shape[1] == 9 and load.tokens_per_expert[:, -1].sum() > 0
    assert load.tokens_per_expert.sum(dim=1).tolist() == [IDS.numel()] * 4
    assert all(old[-1] == new[-1] and not torch.equal(old, new) for old, new in zip(before, biases, strict=True))


def test_a_bias_that_is_added(tmp_path: Path) -> None:
    model = family("qwen3_moe")
    before = model(input_ids=IDS, use_cache=False).logits
    assert add_balancing_bias(model) == 4
    assert_same(model(input_ids=IDS, use_cache=False).logits, before)  # zeros change nothing
    gates = find_biased_gates(model)
    assert [gate.layer.bias.name for gate in gates] == ["e_score_correction_bias"] * 4
    track_router_load(model)
    first = violation(model)
    for _ in range(100):
        model(input_ids=IDS, use_cache=False)
        update_router_bias(model, 3e-3)
    assert violation(model) < 0.3 * first
    changed = model(input_ids=IDS, use_cache=False).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert loaded.config.added_balancing_bias is True
    assert add_balancing_bias(loaded, tmp_path) == 4
    assert_same(loaded(input_ids=IDS, use_cache=False).logits, changed)
    with pytest.raises(ValueError, match="its gates have a balancing bias already"):
        add_balancing_bias(loaded)
    family("qwen3_moe").save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match=r"it holds no model\.layers\.0\.mlp\.gate\.e_score_correction_bias"):
        add_balancing_bias(family("qwen3_moe"), tmp_path / "without")


@pytest.mark.parametrize("name", ["glm4_moe", "afmoe", "mixtral", "inkling", "deepseek_v4"])
def test_scores_and_traces(name: str) -> None:
    """By the choices that the experts receive, counted token by token."""
    model = family(name).eval()
    chosen: dict[int, torch.Tensor] = {}
    for layer in find_moe_layers(model):
        hook = lambda _, args, index=layer.index: chosen.__setitem__(index, args[1].sort(dim=1).values)  # noqa: E731
        layer.experts.register_forward_pre_hook(hook)
    scores = score_experts(model, [IDS[:2]], method="token")
    for layer, values in scores.items():
        ids = chosen[layer].view(2, 16, -1)
        expected = sum(row.flatten().bincount(minlength=8).double() / (16 * ids.shape[-1]) for row in ids) / 2
        assert_same(values, expected)
    gate_scores = score_experts(model, [IDS[:2]])
    trace = trace_routing(model, [IDS[:2]])
    assert trace.layers == tuple(scores) and torch.equal(
        trace.expert_ids[0].long().sort(dim=1).values, chosen[trace.layers[0]]
    )
    normalises = name in ("glm4_moe", "afmoe", "mixtral", "deepseek_v4")
    assert not normalises or all(abs(float(values.sum()) - 1) < 1e-5 for values in gate_scores.values())
    assert trace.entropy.isnan().any() == (name == "inkling")  # whose gate route() cannot express


@pytest.mark.parametrize(
    ("name", "gate"), [("afmoe", "mlp.router"), ("glm4_moe", "mlp.gate"), ("granitemoe", "block_sparse_moe.router")]
)
def test_lora_trains_the_gate_under_its_name(name: str, gate: str) -> None:
    config = expert_lora_config(family(name), r=4, train_router=True)
    assert config.modules_to_save == [gate]


def test_a_table_needs_no_bias() -> None:
    """V4's other gates have one."""
    model = family("deepseek_v4")
    with pytest.raises(ValueError, match="its gates have a balancing bias already, or choose from a table"):
        add_balancing_bias(model)
    assert not hasattr(model.config, "added_balancing_bias")


@pytest.mark.parametrize("name", ["gemma4", "granitemoe", "deepseek_v4"])
def test_files_of_esft(name: str, tmp_path: Path) -> None:
    """Whatever the block is called, also where it is the decoder layer."""
    model, other = family(name).eval(), family(name).eval()
    index = find_moe_layers(model)[-1].index
    prepare_esft(model, {index: [0, 3]})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    save_esft(model, tmp_path / "esft")
    load_esft(other, tmp_path / "esft")
    expected = model(input_ids=IDS, use_cache=False).logits
    assert_same(other(input_ids=IDS, use_cache=False).logits, expected)
    assert not torch.equal(family(name).eval()(input_ids=IDS, use_cache=False).logits, expected)


def test_what_add_balancing_bias_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = family("qwen3_moe")
    with pytest.raises(ValueError, match=r"checkpoint='.*nowhere' is not allowed: it must be a folder"):
        add_balancing_bias(model, tmp_path / "nowhere")
    adapted = get_peft_model(family("qwen3_moe"), expert_lora_config(family("qwen3_moe"), r=2, train_router=True))
    with pytest.raises(ValueError, match=r"it has adapters of PEFT\. Give its gates a bias before get_peft_model"):
        add_balancing_bias(adapted)
    add_balancing_bias(model)
    model.save_pretrained(tmp_path)
    logging.getLogger("modeling_deepseekmoe").propagate = True
    assert add_balancing_bias(AutoModelForCausalLM.from_pretrained(tmp_path)) == 4
    assert "They begin with zeros now" in caplog.text
    with pytest.raises(ValueError, match=r"of shape \(8,\) is not allowed: there are 4 experts"):
        add_balancing_bias(family("qwen3_moe", num_experts=4, num_local_experts=4), tmp_path)


def test_tools_understand_gates_that_were_replaced_or_copied() -> None:
    model = family("qwen3_moe")
    add_balancing_bias(model)
    assert route_native_gates(model, "eager") == 4
    add_auxiliary_loss(model, expert=1.0)
    assert not trace_routing(model.eval(), [IDS[:2]]).entropy.isnan().any()
    adapted = get_peft_model(model.train(), expert_lora_config(model, r=2, train_router=True))
    adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    gates = [p.grad for name, p in adapted.named_parameters() if "modules_to_save" in name]
    assert len(gates) == 4 and all(gradient.any() for gradient in gates)
    assert [gate.saved for gate in find_biased_gates(adapted)] == [True] * 4
    ernie = family("ernie4_5_moe")
    ernie = get_peft_model(ernie, expert_lora_config(ernie, r=2, train_router=True))
    assert [gate.saved for gate in find_biased_gates(ernie)] == [True] * 3


def test_wrapped_blocks_count_once() -> None:
    model = family("glm4_moe")
    for layer in model.model.layers[1:]:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    assert [layer.index for layer in find_moe_layers(model)] == [1, 2, 3]


def test_esft_of_blocks_under_another_name(tmp_path: Path) -> None:
    model = family("granitemoe")
    prepare_esft(model, {1: [0, 3]})
    with torch.no_grad():
        model.model.layers[1].block_sparse_moe.experts.selected_down_proj.add_(1.0)
    save_esft(model, tmp_path / "esft")
    again = family("granitemoe")
    load_esft(again, tmp_path / "esft")
    merge_esft(model)
    model, again = model.eval(), again.eval()
    assert_same(again(input_ids=IDS, use_cache=False).logits, model(input_ids=IDS, use_cache=False).logits)
