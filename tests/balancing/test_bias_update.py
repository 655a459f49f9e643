"""The update of the bias: its rules, the models it finds its way in, what it leaves alone."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import V3_LIKE
from native_models import batch, biases, native_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from modeling_deepseekmoe import (
    DeepseekMoeForCausalLM,
    RouterStats,
    bias_step,
    take_router_load,
    track_router_load,
    untrack_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.balancing.gates import find_biased_gates
from modeling_deepseekmoe.balancing.tracking import router_load_counter
from modeling_deepseekmoe.reminders import STEPS_UNTIL_WARNING

COUNTS = torch.tensor([[5, 1, 3, 3], [12, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [2**40 + 1, 2**40, 2**40, 2**40]])
SIGNS = torch.tensor([[-1, 1, 0, 0], [-1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [-1, 1, 1, 1]], dtype=torch.float32)


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


def raw_biases(state_dict: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The biases as they are stored, in the order of the layers."""
    return [state_dict[name] for name in sorted(state_dict) if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize("kind", ["ours", "native"])
def test_the_bias_stays_in_float32(tiny_model: Callable, kind: str, tmp_path: Path) -> None:
    """Ours through every cast. A native model's is rounded by the cast itself, and float32 from the next update on."""
    model = native_model() if kind == "native" else tiny_model(**V3_LIKE)
    track_router_load(model)
    train_step(model)
    update_router_bias(model, 1e-3, "proportional")  # values that bfloat16 cannot hold
    before = [bias.clone() for bias in raw_biases(model.state_dict())]
    model.to(torch.bfloat16)
    cast = raw_biases(model.state_dict())
    if kind == "ours":
        assert all(torch.equal(old, new) for old, new in zip(before, cast, strict=True))
    assert all(bias.dtype == (torch.float32 if kind == "ours" else torch.bfloat16) for bias in cast)
    start = [bias.float().clone() for bias in cast]
    for _ in range(3):  # updates that bfloat16 would round away
        train_step(model)
        update_router_bias(model, 1e-6)
    after = raw_biases(model.state_dict())
    assert all(bias.dtype == torch.float32 for bias in after)
    for old, new in zip(start, after, strict=True):
        assert 0.5e-6 < (new - old).abs().max() < 3.5e-6
    model.save_pretrained(tmp_path)
    saved = raw_biases(load_file(tmp_path / "model.safetensors"))
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    for old, stored, new in zip(after, saved, raw_biases(loaded.state_dict()), strict=True):
        assert stored.dtype == new.dtype == torch.float32
        assert old.numpy().tobytes() == stored.numpy().tobytes() == new.numpy().tobytes()


@pytest.mark.parametrize("update", ["sign", "centered_sign", "proportional"])
def test_a_plain_loop_resumes_bit_for_bit(tiny_model: Callable, tmp_path: Path, update: str) -> None:
    def steps(model: nn.Module, numbers: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in numbers:
            for rows in batch.roll(number, 0).chunk(2):
                train_step(model, rows)
            optimizer.step()
            optimizer.zero_grad()
            update_router_bias(model, 0.01, update)

    whole, part = tiny_model(**V3_LIKE), tiny_model(**V3_LIKE)
    steps(whole, range(6))
    steps(part, range(3))
    part.save_pretrained(tmp_path)
    resumed = DeepseekMoeForCausalLM.from_pretrained(tmp_path).train()
    steps(resumed, range(3, 6))
    for (name, expected), found in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


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


def other_config(model_type: str, **sizes: object) -> PreTrainedConfig:
    """The config of another family; older releases of transformers lack some."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    return CONFIG_MAPPING[model_type](**sizes)


def other_model(model_type: str) -> nn.Module:
    """A small random model of another family, in training mode."""
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
        "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
        "num_experts_per_tok": 3, "moe_k": 3, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 8, "moe_layer_start_index": 1,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(other_config(model_type, **sizes)).train()


@pytest.mark.parametrize("model_type", NATIVE_FAMILIES)
def test_other_models_with_such_a_bias(model_type: str) -> None:
    """Found by their structure: the bias in the router, in a module of its own, or in the block."""
    model = other_model(model_type)
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


FAMILIES_BY_STRUCTURE = ("axk1", "deepseek_v3", "deepseek_v32", "deepseek_v4", "exaone_moe", "glm4_moe",
                         "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "longcat_flash", "mimo_v2_flash",
                         "nemotron_h", "solar_open")  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES_BY_STRUCTURE)
def test_gates_of_released_sizes_are_found(model_type: str) -> None:
    """Without weights: one gate for every module whose name says so, each with experts beside it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(other_config(model_type))
    owners = [name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias")]
    owners += [name for name, _ in model.named_parameters() if name.endswith("e_score_correction_bias")]
    gates = find_biased_gates(model)
    assert len(gates) == len(owners) > 0
    assert all(gate.layer.gate is not gate.layer.experts and not gate.frozen for gate in gates)


def test_tensor_parallel_ranks_count_every_token_once(tiny_model: Callable, tmp_path: Path) -> None:
    """Two ranks with the same tokens, which one process stands for: their sum is halved; a given group is not."""
    model = tiny_model(**V3_LIKE)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        train_step(model)
        train_step(model)
        model.model._tp_size = 2
        load = take_router_load(model)
        assert load.tokens == batch.numel() and load.tokens_per_expert.sum(1).tolist() == [batch.numel() * 3] * 2
        train_step(model)
        load = take_router_load(model, process_group=dist.group.WORLD)
        assert load.tokens == batch.numel()
        empty = take_router_load(model)  # a rank without a token takes part all the same
        assert empty.tokens == 0 and empty.tokens_per_expert.shape == (2, 8)
        stats = RouterStats(model)
        stats.add(empty)
        with pytest.raises(ValueError, match="no token was routed in training in 1 steps"):
            stats.summary()
    finally:
        dist.destroy_process_group()


def test_a_bias_that_fsdp2_shards(tmp_path: Path) -> None:
    """ERNIE's bias is a parameter, and so a DTensor under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    model = other_model("ernie4_5_moe")
    track_router_load(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        model(batch, labels=batch).loss.backward()
        load = update_router_bias(model, 0.5)
        for gate, step in zip(find_biased_gates(model), bias_step(load.tokens_per_expert, 0.5), strict=True):
            assert isinstance(gate.bias, DTensor) and torch.equal(gate.whole_bias().flatten(), step)
        stats = RouterStats(model)
        stats.add(load)
        assert stats.summary()["router/bias_norm"] > 0.5
    finally:
        dist.destroy_process_group()


def test_bad_input(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    with pytest.raises(ValueError, match=r"update='signum' .* 'sign', 'centered_sign', 'proportional'"):
        update_router_bias(model, update="signum")
    for rate in (0, -1e-3, float("nan"), float("inf"), "fast", True):
        with pytest.raises(ValueError, match=r"update_rate=.* above 0"):
            update_router_bias(model, rate)
    with pytest.raises(ValueError, match=r"no gate with a balancing bias.* topk_method='noaux_tc'"):
        update_router_bias(tiny_model())
    with pytest.raises(ValueError, match=r"track_router_load\(model\)"):
        update_router_bias(native_model())
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        track_router_load(nn.Linear(2, 2))
    odd = nn.Module()
    odd.router = nn.Module()
    odd.router.register_buffer("e_score_correction_bias", torch.zeros(4))
    with pytest.raises(ValueError, match=r"router\.e_score_correction_bias is not understood"):
        find_biased_gates(odd)
    pair = nn.ModuleList([tiny_model(**V3_LIKE), tiny_model(**V3_LIKE)])
    with pytest.raises(ValueError, match=r"4 MoE layers and counts 2: it takes one whole model"):
        update_router_bias(pair)
    uneven = tiny_model(**V3_LIKE)
    uneven.model.layers[2].mlp.gate.e_score_correction_bias = torch.zeros(4)
    with pytest.raises(
        ValueError, match=r"e_score_correction_bias is not understood: there are no `experts` .*, 4 of"
    ):
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


def loop(
    model: DeepseekMoeForCausalLM, steps: int, accumulate: int = 1, update: bool = False, optimizers: int = 1
) -> None:
    parameters = list(model.parameters())
    parts = [torch.optim.SGD(parameters[part::optimizers], lr=1e-3) for part in range(optimizers)]
    for _ in range(steps):
        for _ in range(accumulate):
            train_step(model, batch[:1])
        for optimizer in parts:
            optimizer.step()
            optimizer.zero_grad()
        if update:
            update_router_bias(model)


def test_a_loop_without_updates_is_warned_once(tiny_model: Callable, warnings_of_the_library: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    loop(model, STEPS_UNTIL_WARNING, accumulate=2, optimizers=2)
    assert not warnings_of_the_library()
    loop(model, 1)  # its forward pass finds the steps before
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


def test_layers_are_counted_by_the_names_of_their_gates() -> None:
    """Also in models whose layers are called otherwise."""
    gate = nn.Linear(4, 3, bias=False)
    gate.e_score_correction_bias = nn.Buffer(torch.zeros(3))

    class Experts(nn.Module):
        num_experts = 3

        def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return hidden

    blocks = nn.ModuleDict({"2": nn.ModuleDict({"gate": gate, "experts": Experts()})})
    model = nn.ModuleDict({"blocks": blocks})
    track_router_load(model)
    assert router_load_counter(model).layers == (2,)
