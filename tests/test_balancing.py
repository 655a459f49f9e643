"""The expert-level balance loss against an independent double-precision loop."""

import pytest
import torch
from tolerances import DOUBLE

from modeling_deepseekmoe import expert_balance_loss

ALPHA = 0.01


def loss_by_loop(scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, sequence_wise: bool) -> torch.Tensor:
    """alpha * sum_i f_i P_i, token by token."""
    batch, length, experts = scores.shape
    top_k = ids.shape[-1]
    where = [[(b, s) for s in range(length) if mask[b, s]] for b in range(batch)]
    parts = [part for part in where if part] if sequence_wise else [[token for part in where for token in part]]
    total = scores.new_zeros(())
    for part in parts:
        for expert in range(experts):
            chosen = sum(int(expert in ids[b, s].tolist()) for b, s in part)
            mean = sum(scores[b, s, expert] for b, s in part) / len(part)
            total = total + ALPHA * experts / (top_k * len(part)) * chosen * mean
    return total / len(parts)


@pytest.mark.parametrize("sequence_wise", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(sequence_wise: bool, masked: bool) -> None:
    logits = torch.randn(3, 7, 5, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.long)
    if masked:
        mask[0, :3], mask[1, 4:], mask[2] = 0, 0, 0
    ids = logits.topk(2).indices
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = expert_balance_loss(
        ours.softmax(-1), ids, ALPHA, token_mask=mask if masked else None, sequence_wise=sequence_wise
    )
    expected = loss_by_loop(theirs.softmax(-1), ids, mask, sequence_wise)
    loss.backward()
    expected.backward()
    assert (loss - expected).abs() <= DOUBLE
    assert (ours.grad - theirs.grad).abs().max() <= DOUBLE


@pytest.mark.parametrize("sequence_wise", [True, False])
def test_a_balanced_router_gives_alpha(sequence_wise: bool) -> None:
    """Every expert chosen equally often: alpha, whatever the affinities; and for uniform affinities, any choice."""
    ids = torch.stack([torch.arange(8), (torch.arange(8) + 3) % 8], dim=-1)[None]
    scores = torch.rand(1, 8, 8, dtype=torch.float64).softmax(-1)
    assert expert_balance_loss(scores, ids, ALPHA, sequence_wise=sequence_wise) == pytest.approx(ALPHA, abs=1e-15)
    ids, scores = torch.zeros(1, 8, 2, dtype=torch.long), torch.full((1, 8, 8), 1 / 8, dtype=torch.float64)
    assert expert_balance_loss(scores, ids, ALPHA, sequence_wise=sequence_wise) == pytest.approx(ALPHA, abs=1e-15)


def test_sigmoid_affinities_are_normalised() -> None:
    scores, ids = torch.rand(2, 4, 6, dtype=torch.float64), torch.rand(2, 4, 6).topk(2).indices
    mask = torch.ones(2, 4, dtype=torch.long)
    expected = loss_by_loop(scores / scores.sum(-1, keepdim=True), ids, mask, True)
    scale = torch.rand(2, 4, 1, dtype=torch.float64) + 0.5  # another one for every token
    assert (expert_balance_loss(scale * scores, ids, ALPHA) - expected).abs() <= DOUBLE


def test_only_padding_gives_zero() -> None:
    loss = expert_balance_loss(torch.rand(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.long), ALPHA,
                               token_mask=torch.zeros(2, 3))  # fmt: skip
    assert loss == 0


def test_a_mask_of_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"token_mask of shape \(2, 4\) .* \(2, 3\)"):
        expert_balance_loss(
            torch.rand(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.long), 1.0, token_mask=torch.ones(2, 4)
        )
