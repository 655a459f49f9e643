"""The update of the bias: its rules, the models it finds its way in, what it leaves alone."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import V3_LIKE
from test_router_load import batch, native_model
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import (
    DeepseekMoeForCausalLM,
    bias_step,
    take_router_load,
    track_router_load,
    untrack_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.bias_update import find_biased_gates
from modeling_deepseekmoe.router_load import STEPS_UNTIL_WARNING

COUNTS = torch.tensor([[5, 1, 3, 3], [12, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [2**40 + 1, 2**40, 2**40, 2**40]])
SIGNS = torch.tensor([[-1, 1, 0, 0], [-1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [-1, 1, 1, 1]], dtype=torch.float32)


def biases(model: nn.Module) -> list[torch.Tensor]:
    return [gate.bias.clone() for gate in find_biased_gates(model)]


def train_step(model: nn.Module, rows: torch.Tensor = batch) -> None:
    model(rows, labels=rows).loss.backward()


def test_rules() -> None:
    assert torch.equal(bias_step(COUNTS), 1e-3 * SIGNS)
    assert torch.equal(bias_step(COUNTS, 0.5, "sign"), 0.5 * SIGNS)
    centered = bias_step(COUNTS, 0.5, "centered_sign")
    assert torch.equal(centered, 0.5 * (SIGNS - SIGNS.mean(-1, keepdim=True)))
    assert centered.sum(-1).abs().max() <= 1e-7
    proportional = bias_step(COUNTS[:4], 0.5, "proportional")
    assert proportional[0].tolist() == pytest.approx([0.5 * (3 - 5) / 3, 0.5 * (3 - 1) / 3, 0, 0])
    assert proportional[1].tolist() == [-1.5, 0.5, 0.5, 0.5]
    assert not proportional[2:].any()


@pytest.mark.parametrize("update", ["sign", "centered_sign", "proportional"])
@pytest.mark.parametrize("kind", ["ours", "native"])
def test_one_update_of_the_whole_batch(tiny_model: Callable, kind: str, update: str) -> None:
    model = native_model() if kind == "native" else tiny_model(**V3_LIKE)
    track_router_load(model)
    before = biases(model)
    for rows in batch.chunk(4):
        train_step(model, rows)
    load = update_router_bias(model, 0.01, update)
    assert load.tokens == batch.numel() and load.micro_batches == 4
    expected = bias_step(load.tokens_per_expert, 0.01, update)
    for old, new, step in zip(before, biases(model), expected, strict=True):
        assert torch.equal(new, old + step) and step.abs().max() > 0
    with pytest.raises(ValueError, match="no token was routed"):
        update_router_bias(model)  # the step's tokens are used up


def test_many_updates_balance_a_router(tiny_model: Callable) -> None:
    """Routing alone: with the weights as they are, the bias brings every load to the mean."""
    model = tiny_model(**V3_LIKE)
    rows = torch.randint(3, 96, (32, 32), generator=torch.Generator().manual_seed(1))

    def violation() -> float:
        load = model.router_load_of(rows)
        return ((load.max(-1).values - load.float().mean(-1)) / load.float().mean(-1)).max().item()

    model.router_load_of = lambda rows: (model(rows), take_router_load(model))[1].tokens_per_expert
    before = violation()
    for _ in range(150):
        model(rows)
        update_router_bias(model, 0.01)
    for _ in range(100):
        model(rows)
        update_router_bias(model, 0.001)
    assert before > 0.5 and violation() < 0.1


@pytest.mark.parametrize("kind", ["ours", "native"])
def test_the_bias_stays_in_float32(tiny_model: Callable, kind: str, tmp_path: Path) -> None:
    model = native_model() if kind == "native" else tiny_model(**V3_LIKE)
    track_router_load(model)
    train_step(model)
    update_router_bias(model, 1e-3)
    saved = biases(model)
    model.to(torch.bfloat16)
    if kind == "ours":
        assert all(torch.equal(old, new) for old, new in zip(saved, biases(model), strict=True))
    for _ in range(3):  # updates that bfloat16 would round away
        train_step(model)
        update_router_bias(model, 1e-6)
    after = biases(model)
    assert all(bias.dtype == torch.float32 for bias in after)
    assert all((new - old).abs().max() > 0 for old, new in zip(saved, after, strict=True))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    for old, new in zip(after, biases(loaded), strict=True):
        assert new.dtype == torch.float32 and old.numpy().tobytes() == new.numpy().tobytes()


def test_frozen_gates_keep_their_bias(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    model.model.layers[1].mlp.gate.requires_grad_(False)
    train_step(model)
    load = update_router_bias(model)
    first, second = biases(model)
    assert not first.any() and second.any()
    assert load.tokens_per_expert.sum(1).tolist() == [batch.numel() * 3] * 2


def test_a_gate_that_peft_trains_as_a_copy(tiny_model: Callable) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model(**V3_LIKE), LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    )
    gates = find_biased_gates(model)
    assert [gate.frozen for gate in gates] == [False, False]
    train_step(model)
    update_router_bias(model, 0.5)
    wrapper = model.base_model.model.model.layers[1].mlp.gate
    used, original = wrapper.modules_to_save.default, wrapper.original_module
    assert used.e_score_correction_bias.any() and not original.e_score_correction_bias.any()
    loads = []
    for _ in range(2):  # the changed bias is the one that routes
        train_step(model)
        loads.append(update_router_bias(model, 0.5).tokens_per_expert)
    assert not torch.equal(*loads)


NATIVE_FAMILIES = ("glm4_moe", "dots1", "ernie4_5_moe", "minimax_m2", "hy_v3")


@pytest.mark.parametrize("model_type", NATIVE_FAMILIES)
def test_other_models_with_such_a_bias(model_type: str) -> None:
    """Found by their structure: the bias in the router, in a module of its own, or in the block."""
    from transformers import CONFIG_MAPPING

    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
        "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
        "num_experts_per_tok": 3, "moe_k": 3, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 8, "moe_layer_start_index": 1,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).train()
    gates = find_biased_gates(model)
    assert len(gates) >= 2 and all(gate.bias.numel() == 8 and not gate.frozen for gate in gates)
    track_router_load(model)
    model(batch, labels=batch).loss.backward()
    load = update_router_bias(model, 0.5)
    assert load.tokens_per_expert.sum(1).tolist() == [batch.numel() * 3] * len(gates)
    for gate, step in zip(gates, bias_step(load.tokens_per_expert, 0.5), strict=True):
        assert torch.equal(gate.bias.flatten(), step) and step.any()
    logits = model(batch).logits
    untrack_router_load(model)
    for gate in gates:
        gate.bias.zero_()
    assert not torch.equal(model(batch).logits, logits)  # the bias that was updated is the one that routes


def test_bad_input(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    with pytest.raises(ValueError, match=r"update='signum' .* 'sign', 'centered_sign', 'proportional'"):
        update_router_bias(model, update="signum")
    for rate in (0, -1e-3, float("nan"), float("inf"), "fast"):
        with pytest.raises(ValueError, match=r"update_rate=.* above 0"):
            update_router_bias(model, rate)
    with pytest.raises(ValueError, match=r"no gate with a balancing bias .* topk_method='noaux_tc'"):
        update_router_bias(tiny_model())
    with pytest.raises(ValueError, match=r"track_router_load\(model\)"):
        update_router_bias(native_model())
    with pytest.raises(ValueError, match="no gate with a balancing bias"):
        track_router_load(nn.Linear(2, 2))
    odd = nn.Module()
    odd.router = nn.Module()
    odd.router.register_buffer("e_score_correction_bias", torch.zeros(4))
    with pytest.raises(ValueError, match=r"router\.e_score_correction_bias is not understood"):
        find_biased_gates(odd)
    uneven = tiny_model(**V3_LIKE)
    uneven.model.layers[2].mlp.gate.e_score_correction_bias = torch.zeros(4)
    with pytest.raises(ValueError, match="different numbers of experts"):
        find_biased_gates(uneven)


def test_experts_with_another_signature() -> None:
    model = native_model()
    track_router_load(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts was not called with"):
        model.model.layers[1].mlp.gate.register_forward_hook(lambda _, __, output: (output[0], output[2], output[1]))
        model(batch[:1])


@pytest.fixture
def warnings_of_the_library(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.message for record in caplog.records if "nothing updates the bias" in record.message]


def loop(model: DeepseekMoeForCausalLM, steps: int, accumulate: int = 1, update: bool = False) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        for _ in range(accumulate):
            train_step(model, batch[:1])
        optimizer.step()
        optimizer.zero_grad()
        if update:
            update_router_bias(model)


def test_a_loop_without_updates_is_warned_once(tiny_model: Callable, warnings_of_the_library: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    loop(model, STEPS_UNTIL_WARNING - 1, accumulate=2)
    assert not warnings_of_the_library()
    loop(model, 1)
    (message,) = warnings_of_the_library()
    assert "50 steps" in message and "callbacks=[LoadBalancingCallback()]" in message
    assert "update_router_bias(model)" in message
    loop(model, STEPS_UNTIL_WARNING + 1)
    assert len(warnings_of_the_library()) == 1


def test_who_is_not_warned(tiny_model: Callable, warnings_of_the_library: Callable) -> None:
    loop(tiny_model(**V3_LIKE), STEPS_UNTIL_WARNING + 5, update=True)
    loop(tiny_model(), STEPS_UNTIL_WARNING + 5)
    frozen = tiny_model(**V3_LIKE)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(".gate." not in name)
    loop(frozen, STEPS_UNTIL_WARNING + 5)
    idle = tiny_model(**V3_LIKE).eval()
    idle(batch)
    loop(tiny_model(), STEPS_UNTIL_WARNING + 5)
    assert not warnings_of_the_library()


def test_models_can_be_copied_in_the_middle_of_a_step(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    train_step(model)
    twin = copy.deepcopy(model)
    assert torch.equal(take_router_load(twin).tokens_per_expert, take_router_load(model).tokens_per_expert)
