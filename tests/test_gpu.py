"""The same figures on a GPU. Run with `make test-gpu` where there is one."""

import pytest
import torch
from conftest import EXPERTS_IMPLEMENTATIONS, Golden
from tolerances import GOLDEN_LOGITS, LOW_PRECISION_LOSS

from modeling_deepseekmoe import RouterStats, take_router_load, update_router_bias

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
