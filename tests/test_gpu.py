"""The same figures on a GPU. Run with `make test-gpu` where there is one."""

import pytest
import torch
from conftest import EXPERTS_IMPLEMENTATIONS, Golden
from test_lora import IDS, direct, make
from tolerances import GOLDEN_LOGITS, LOW_PRECISION_LOSS, assert_same

from modeling_deepseekmoe import RouterStats, prepare_esft, take_router_load, update_router_bias

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS)
def test_golden_logits(golden: Golden, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, expected = golden.model(experts_implementation=implementation).cuda(), golden.expected
    with torch.no_grad():
        logits = model(expected["input_ids"].cuda()).logits.cpu()
    assert (logits - expected["logits"]).abs().max() <= GOLDEN_LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_training_step(golden: Golden, dtype: torch.dtype) -> None:
    model, expected = golden.model(dtype=dtype).cuda().train(), golden.expected
    input_ids = expected["input_ids"].cuda()
    outputs = model(input_ids, labels=input_ids)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    if "train.task_loss" in expected:
        task_loss = outputs.loss - outputs.aux_loss
        assert abs(task_loss.item() - expected["train.task_loss"].item()) <= LOW_PRECISION_LOSS


def test_counts_are_those_of_the_cpu_and_nothing_waits_for_the_host(v3: Golden) -> None:
    on_cpu, on_gpu = v3.model().train(), v3.model(experts_implementation="grouped_mm").cuda().train()
    input_ids = v3.expected["input_ids"]
    mask = (torch.arange(17)[None] < torch.tensor([17, 9, 13])[:, None]).long()
    on_cpu(input_ids, attention_mask=mask, labels=input_ids)
    stats = RouterStats(on_gpu)
    on_gpu(input_ids.cuda(), attention_mask=mask.cuda(), labels=input_ids.cuda()).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        load = update_router_bias(on_gpu)
        stats.add(load)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(load.tokens_per_expert.cpu(), take_router_load(on_cpu).tokens_per_expert)
    assert stats.summary()["router/entropy"] > 0


@pytest.mark.parametrize("tokens", [1, 18])
def test_lora_on_experts_is_that_of_the_cpu(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    ids = IDS.flatten()[None, :tokens]
    on_cpu, on_gpu = direct(make()).train(), direct(make()).cuda().train()
    found, expected = on_gpu(ids.cuda()).logits, on_cpu(ids).logits
    assert_same(found.cpu(), expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in on_gpu.named_parameters() if p.requires_grad}
    for name, parameter in on_cpu.named_parameters():
        if parameter.requires_grad:
            assert_same(gradients[name].cpu(), parameter.grad, name)


@pytest.mark.parametrize("rank", [2, 16])
def test_lora_in_bfloat16_never_waits_for_the_host(rank: int) -> None:
    experts = direct(make().to(torch.bfloat16), r=rank).cuda().train().base_model.model.model.layers[1].mlp.experts
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids = torch.rand(64, 8, device="cuda").topk(3).indices
    weights = torch.rand(64, 3, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(hidden, ids, weights).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for name, p in experts.named_parameters() if "lora_" in name)


def test_selected_experts_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    models = [make(), make().cuda()]
    for model in models:
        prepare_esft(model, {1: [0, 6], 2: [3]})
        model.train()(IDS.to(model.device), labels=IDS.to(model.device)).loss.backward()
    for (name, one), (_, two) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        if one.requires_grad:
            assert_same(two.grad.cpu(), one.grad, name)
