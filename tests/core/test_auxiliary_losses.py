"""The balance losses against independent double-precision loops over tokens, and MaxVio."""

from collections.abc import Callable

import pytest
import torch
from conftest import V3_LIKE
from tolerances import DOUBLE, assert_same

from modeling_deepseekmoe import (
    communication_balance_loss,
    device_balance_loss,
    expert_balance_loss,
    max_violation,
    router_z_loss,
    sequence_balance_loss,
    take_router_load,
)
from modeling_deepseekmoe.auxiliary_losses import LOSS_NAMES
from modeling_deepseekmoe.configuration_checks import LOSS_FIELDS
from modeling_deepseekmoe.routing_eager import affinities

ALPHA = 0.01
BATCH, LENGTH, EXPERTS, TOP_K, DEVICES, LIMIT = 3, 7, 6, 2, 3, 2


def parts_of(mask: torch.Tensor, sequence_wise: bool) -> list[list[tuple[int, int]]]:
    """The real tokens of every sequence that has any, or of the whole batch."""
    where = [[(b, s) for s in range(LENGTH) if mask[b, s]] for b in range(BATCH)]
    return [part for part in where if part] if sequence_wise else [[token for part in where for token in part]]


def expert_by_loop(scores: torch.Tensor, ids: torch.Tensor, part: list[tuple[int, int]]) -> torch.Tensor:
    total = scores.new_zeros(())
    for expert in range(EXPERTS):
        chosen = sum(int(expert in ids[b, s].tolist()) for b, s in part)
        mean = sum(scores[b, s, expert] for b, s in part) / len(part)
        total = total + EXPERTS / (TOP_K * len(part)) * chosen * mean
    return total


def device_by_loop(scores: torch.Tensor, ids: torch.Tensor, part: list[tuple[int, int]]) -> torch.Tensor:
    total, size = scores.new_zeros(()), EXPERTS // DEVICES
    for device in range(DEVICES):
        f, p = 0.0, scores.new_zeros(())
        for expert in range(device * size, (device + 1) * size):
            f += EXPERTS / (TOP_K * len(part)) * sum(int(expert in ids[b, s].tolist()) for b, s in part) / size
            p = p + sum(scores[b, s, expert] for b, s in part) / len(part)
        total = total + f * p
    return total


def communication_by_loop(scores: torch.Tensor, ids: torch.Tensor, part: list[tuple[int, int]]) -> torch.Tensor:
    total, size = scores.new_zeros(()), EXPERTS // DEVICES
    for device in range(DEVICES):
        sent = sum(int(any(expert // size == device for expert in ids[b, s].tolist())) for b, s in part)
        p = sum(scores[b, s, device * size : (device + 1) * size].sum() for b, s in part) / len(part)
        total = total + DEVICES / (LIMIT * len(part)) * sent * p
    return total


def sequence_by_loop(scores: torch.Tensor, ids: torch.Tensor, part: list[tuple[int, int]]) -> torch.Tensor:
    """As the expert loss, on the highest affinities whatever was chosen."""
    best = torch.stack([torch.stack([row.sort(descending=True).indices[:TOP_K] for row in rows]) for rows in scores])
    return expert_by_loop(scores, best, part)


LOOPS = {
    "expert": (expert_by_loop, expert_balance_loss, (ALPHA,)),
    "device": (device_by_loop, device_balance_loss, (ALPHA, DEVICES)),
    "communication": (communication_by_loop, communication_balance_loss, (ALPHA, DEVICES, LIMIT)),
    "sequence": (sequence_by_loop, sequence_balance_loss, (TOP_K, ALPHA)),
}


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sequence_wise", [True, False])
@pytest.mark.parametrize("name", LOOPS)
def test_values_and_gradients(name: str, sequence_wise: bool, masked: bool, affinity: str) -> None:
    loop, loss_function, arguments = LOOPS[name]
    choice = {"sequence_wise": sequence_wise}
    logits = torch.randn(BATCH, LENGTH, EXPERTS, dtype=torch.float64)
    ids = (logits + torch.randn(EXPERTS, dtype=torch.float64)).topk(TOP_K).indices  # as a bias would choose
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if masked:
        mask[0, :3], mask[1, 4:], mask[2] = 0, 0, 0
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    scores = mine.softmax(-1) if affinity == "softmax" else mine.sigmoid()
    if name == "sequence":  # takes no choices, and is of sequences only
        sequence_wise, choice = True, {}
    else:
        arguments = (ids, *arguments)
    loss = loss_function(scores, *arguments, token_mask=mask if masked else None, **choice)
    raw = theirs.exp() if affinity == "softmax" else 1 / (1 + (-theirs).exp())
    shares = raw / raw.sum(-1, keepdim=True)
    parts = parts_of(mask, sequence_wise)
    expected = ALPHA * sum(loop(shares, ids, part) for part in parts) / len(parts)
    loss.backward()
    expected.backward()
    assert (loss - expected).abs() <= DOUBLE
    assert (mine.grad - theirs.grad).abs().max() <= DOUBLE
    assert mine.grad.abs().max() > 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_router_z_loss(masked: bool) -> None:
    logits = torch.randn(BATCH, LENGTH, EXPERTS, dtype=torch.float64)
    mask = torch.ones(BATCH, LENGTH)
    if masked:
        mask[0, :3], mask[2] = 0, 0
        logits[2] = 1e6  # what stands in padding must not matter
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = router_z_loss(mine, ALPHA, token_mask=mask if masked else None)
    part = parts_of(mask, False)[0]
    expected = ALPHA * sum(theirs[b, s].exp().sum().log() ** 2 for b, s in part) / len(part)
    loss.backward()
    expected.backward()
    assert (loss - expected).abs() <= DOUBLE
    assert (mine.grad - theirs.grad).abs().max() <= DOUBLE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sequence_wise", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 6), (12, 3), (256, 8)])
def test_a_uniform_router_gives_exactly_alpha(
    experts: int, top_k: int, sequence_wise: bool, dtype: torch.dtype
) -> None:
    """All affinities equal, and every expert chosen equally often."""
    ids = torch.stack([(torch.arange(experts) + shift) % experts for shift in range(top_k)], dim=-1).repeat(2, 1, 1)
    scores = torch.full((2, experts, experts), 1 / experts, dtype=dtype)
    close = pytest.approx(ALPHA, rel=4 * torch.finfo(dtype).eps)
    assert expert_balance_loss(scores, ids, ALPHA, sequence_wise=sequence_wise).item() == close
    assert device_balance_loss(scores, ids, ALPHA, 4, sequence_wise=sequence_wise).item() == close
    assert sequence_balance_loss(scores, top_k, ALPHA).item() == close


def test_a_balanced_load_gives_alpha_whatever_the_affinities() -> None:
    ids = torch.stack([torch.arange(8), (torch.arange(8) + 3) % 8], dim=-1)[None]
    scores = torch.rand(1, 8, 8, dtype=torch.float64).softmax(-1)
    assert expert_balance_loss(scores, ids, ALPHA) == pytest.approx(ALPHA, abs=1e-15)
    # One expert on each of the two halves: every token is sent to both devices.
    ids = torch.stack([torch.arange(8) % 4, torch.arange(8) % 4 + 4], dim=-1)[None]
    assert communication_balance_loss(scores, ids, ALPHA, 2, 2) == pytest.approx(ALPHA, abs=1e-15)
    # All experts on one device: it gets every token once, of the two that a token may use.
    assert communication_balance_loss(scores, ids % 4, ALPHA, 2, 2).item() == pytest.approx(
        ALPHA * scores[..., :4].sum().item() / 8, abs=1e-15
    )


def test_sigmoid_affinities_are_normalised() -> None:
    scores, ids = torch.rand(2, 4, 6, dtype=torch.float64), torch.rand(2, 4, 6).topk(2).indices
    scale = torch.rand(2, 4, 1, dtype=torch.float64) + 0.5  # another one for every token
    expected = expert_balance_loss(scores, ids, ALPHA)
    assert (expert_balance_loss(scale * scores, ids, ALPHA) - expected).abs() <= DOUBLE


def test_only_padding_gives_zero() -> None:
    scores, ids, mask = torch.rand(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.long), torch.zeros(2, 3)
    assert expert_balance_loss(scores, ids, ALPHA, token_mask=mask) == 0
    assert device_balance_loss(scores, ids, ALPHA, 2, token_mask=mask) == 0
    assert communication_balance_loss(scores, ids, ALPHA, 2, 1, token_mask=mask) == 0
    assert sequence_balance_loss(scores, 1, ALPHA, token_mask=mask) == 0
    assert router_z_loss(scores, ALPHA, token_mask=mask) == 0


def test_bad_input() -> None:
    scores, ids = torch.rand(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.long)
    for call in (
        lambda mask: expert_balance_loss(scores, ids, 1.0, token_mask=mask),
        lambda mask: device_balance_loss(scores, ids, 1.0, 2, token_mask=mask),
        lambda mask: communication_balance_loss(scores, ids, 1.0, 2, 1, token_mask=mask),
        lambda mask: sequence_balance_loss(scores, 1, 1.0, token_mask=mask),
        lambda mask: router_z_loss(scores, 1.0, token_mask=mask),
    ):
        with pytest.raises(ValueError, match=r"token_mask of shape \(2, 4\) .* \(2, 3\)"):
            call(torch.ones(2, 4))
    for call in (
        lambda: expert_balance_loss(scores, ids, -0.5),
        lambda: device_balance_loss(scores, ids, -0.5, 2),
        lambda: communication_balance_loss(scores, ids, -0.5, 2, 1),
        lambda: sequence_balance_loss(scores, 1, -0.5),
        lambda: router_z_loss(scores, -0.5),
    ):
        with pytest.raises(ValueError, match=r"alpha=-0\.5 is not allowed: .* at least 0"):
            call()
    for call in (
        lambda: device_balance_loss(scores, ids, 1.0, 3),
        lambda: communication_balance_loss(scores, ids, 1.0, 3, 1),
    ):
        with pytest.raises(ValueError, match=r"num_device_groups=3 .* divide the 4 experts"):
            call()
    with pytest.raises(ValueError, match=r"max_devices_per_token=3 .* between 1 and num_device_groups=2"):
        communication_balance_loss(scores, ids, 1.0, 2, 3)
    with pytest.raises(ValueError, match=r"top_k=5 .* 4 experts"):
        sequence_balance_loss(scores, 5, 1.0)
    with pytest.raises(ValueError, match=r"expert_ids of shape \(2, 2, 1\) .* \(2, 3\)"):
        expert_balance_loss(scores, ids[:, :2], 1.0)
    with pytest.raises(ValueError, match=r"shape \(6, 4\) .* \(batch, sequence, E\)"):
        expert_balance_loss(scores.flatten(0, 1), ids.flatten(0, 1), 1.0)


# ------------------------------------------------------------------------------------------------- through the model
COEFFICIENTS = {"aux_loss_alpha": 0.3, "device_balance_alpha": 0.2, "communication_balance_alpha": 0.1,
                "sequence_balance_alpha": 0.05, "router_z_loss_alpha": 0.01, "n_device_groups": 2,
                "max_devices_per_token": 2}  # fmt: skip
batch = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(5))


LENGTHS = {"none": (11, 11, 11), "right": (11, 4, 7), "left": (6, 11, 3), "a row of padding": (11, 0, 5)}


@pytest.mark.parametrize("padding", LENGTHS)
@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("only", [None, *(name for name in COEFFICIENTS if name.endswith("alpha"))])
def test_the_config_combines_the_losses(tiny_model: Callable, only: str | None, seq_aux: bool, padding: str) -> None:
    settings = {name: value for name, value in COEFFICIENTS.items() if only in (None, name) or isinstance(value, int)}
    model = tiny_model(**{"aux_loss_alpha": 0.0, **V3_LIKE, **settings}, seq_aux=seq_aux)
    positions, lengths = torch.arange(11)[None], torch.tensor(LENGTHS[padding])[:, None]
    mask = (positions >= 11 - lengths if padding == "left" else positions < lengths).long()
    plans = []
    for layer in model.config.moe_layers:
        gate = model.model.layers[layer].mlp.gate
        gate.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, 8))
        gate.register_forward_hook(lambda module, args, output: plans.append(output))
    labels = batch.masked_fill(mask == 0, -100)
    outputs = model(batch, labels=labels, attention_mask=mask)
    expected = dict.fromkeys(LOSS_NAMES, torch.zeros(()))
    kwargs = {"token_mask": mask}
    for logits, plan in plans:
        logits, ids = logits.view(3, 11, 8), plan.expert_ids.view(3, 11, 3)
        scores = affinities(logits, model.config.scoring_func)
        losses = {
            "expert": expert_balance_loss(scores, ids, 0.3, sequence_wise=seq_aux, **kwargs),
            "device": device_balance_loss(scores, ids, 0.2, 2, sequence_wise=seq_aux, **kwargs),
            "communication": communication_balance_loss(scores, ids, 0.1, 2, 2, sequence_wise=seq_aux, **kwargs),
            "sequence": sequence_balance_loss(scores, 3, 0.05, **kwargs),
            "router_z": router_z_loss(logits, 0.01, **kwargs),
        }
        for name, loss in losses.items():
            if only in (None, LOSS_FIELDS[name]):
                expected[name] = expected[name] + loss
    assert len(plans) == 2 and len({round(loss.item(), 6) for loss in expected.values() if loss}) in (1, 5)
    assert_same(outputs.aux_loss, sum(expected.values()))
    task_loss = model.eval()(batch, labels=labels, attention_mask=mask).loss
    assert_same(outputs.loss, task_loss + outputs.aux_loss)
    outputs.aux_loss.backward()
    assert gate.weight.grad.abs().max() > 0
    logged = dict(zip(LOSS_NAMES, take_router_load(model).losses, strict=True))
    for name, loss in expected.items():
        assert_same(logged[name], loss.detach(), name)


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
@pytest.mark.parametrize("seq_aux", [True, False])
def test_a_uniform_gate_of_a_model_gives_exactly_alpha(tiny_model: Callable, affinity: str, seq_aux: bool) -> None:
    fields = {"aux_loss_alpha": 0.01, "device_balance_alpha": 0.05, "n_device_groups": 2, "seq_aux": seq_aux,
              "sequence_balance_alpha": 0.02, "scoring_func": affinity, "num_hidden_layers": 2}  # fmt: skip
    model = tiny_model(**fields)
    torch.nn.init.zeros_(model.model.layers[1].mlp.gate.weight)
    model(batch)
    losses = take_router_load(model).losses
    assert losses.tolist() == pytest.approx([0.01, 0.05, 0.0, 0.02, 0.0], rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("shape", [(3, 12), (3, 10), (2, 11), (1, 11), (3,)])
def test_a_mask_of_the_wrong_shape_for_the_model(tiny_model: Callable, alpha: float, shape: tuple[int, ...]) -> None:
    model = tiny_model(**V3_LIKE, aux_loss_alpha=alpha)
    with pytest.raises(ValueError, match=r"attention_mask of shape .* is not allowed: .* \(3, 11\)"):
        model(batch, attention_mask=torch.ones(shape, dtype=torch.long))


def test_coefficients_that_were_set_later_are_checked(tiny_model: Callable) -> None:
    model = tiny_model()
    model.config.router_aux_loss_coef = -1.0
    with pytest.raises(ValueError, match=r"alpha=-1\.0 is not allowed"):
        model(batch)


def test_max_violation() -> None:
    loads = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 4, 4, 0]])
    assert max_violation(loads).tolist() == [0.0, 3.0, 1.0]
    assert max_violation(loads[2]).item() == 1.0
    assert max_violation(torch.zeros(4, dtype=torch.long)).isnan()
