"""DeepSeek's balance losses on the models of other packages, against the formulas in float64, token by token."""

import copy
import logging
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from other_families import family
from tolerances import assert_same
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_deepseekmoe import RouterStatsCallback, add_auxiliary_loss
from modeling_deepseekmoe.balancing.loss_hooks import _with_aux_loss
from modeling_deepseekmoe.families.gate_rules import rule_of
from modeling_deepseekmoe.families.moe_layers import find_moe_layers

IDS = torch.randint(3, 100, (3, 8), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(8)[None] < torch.tensor([8, 5, 7])[:, None]).long()
COEFFICIENTS = {"expert": 0.5, "device": 0.3, "sequence": 0.2, "z": 0.01}
FAMILIES = ("qwen3_moe", "glm4_moe", "deepseek_v4", "minimax_m2", "gpt_oss")


def formula(score: str, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The losses of one layer, from 2401.06066 (eq. 12 to 17), 2412.19437 (eq. 17 to 20) and 2202.08906 (eq. 5)."""
    scores = {"softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid,
              "sqrtsoftplus": lambda: nn.functional.softplus(logits).sqrt()}[score]()  # fmt: skip
    shares = scores / scores.sum(-1, keepdim=True)
    experts, top_k = logits.shape[-1], ids.shape[-1]
    total = logits.new_zeros(())
    for row, mask in enumerate(MASK.bool()):
        tokens = int(mask.sum())
        p = shares[row][mask].mean(0)
        for name, chosen in (("expert", ids[row][mask]), ("sequence", scores[row][mask].topk(top_k).indices)):
            f = torch.stack([(chosen == expert).sum() for expert in range(experts)]) * experts / (top_k * tokens)
            total = total + COEFFICIENTS[name] * (f * p).sum() / len(MASK)
            if name == "expert":
                halves = (f.double().view(2, -1).mean(1) * p.view(2, -1).sum(1)).sum()
                total = total + COEFFICIENTS["device"] * halves / len(MASK)
    return total + COEFFICIENTS["z"] * logits[MASK.bool()].logsumexp(-1).square().mean()


def expected_of(model: nn.Module, **more: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The cross entropy, the losses and the gradients of both, in float64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    logits: list[torch.Tensor] = []
    ids: list[torch.Tensor] = []
    layers = find_moe_layers(model)
    for layer in layers:
        layer.gate.register_forward_hook(lambda _, __, output: logits.append(output[0].double()))
        layer.experts.register_forward_pre_hook(lambda _, args: ids.append(args[1]))
    labels = IDS.masked_fill(MASK == 0, -100)
    more |= {"use_cache": False, "output_router_logits": False}
    task = model(input_ids=IDS, attention_mask=MASK, labels=labels, **more).loss.double()
    losses = sum(
        formula(rule_of(layer).options.score_function, one.view(*IDS.shape, -1), chosen.view(*IDS.shape, -1))
        for layer, one, chosen in zip(layers, logits, ids, strict=True)
    )
    (task + losses).backward()
    return task, losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(model: nn.Module, gradients: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name].double(), factor * gradient, atol=2e-5 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_those_of_the_formulas(name: str) -> None:
    model = family(name)
    task, losses, gradients = expected_of(model)
    add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    labels = IDS.masked_fill(MASK == 0, -100)
    outputs = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False)
    assert_same(outputs.aux_loss.detach().double(), losses.detach())
    assert_same(outputs.loss.detach().double(), (task + losses).detach())
    outputs.loss.backward()
    close(model, gradients)
    model.eval()
    alone = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False, output_router_logits=True)
    assert_same(alone.loss.detach().double(), task.detach())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_accumulation(reentrant: bool) -> None:
    """Two passes before one backward pass, each with a factor of its own."""
    model = family("glm4_moe")
    _, _, gradients = expected_of(model)
    add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    labels = IDS.masked_fill(MASK == 0, -100)
    losses = [model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False).loss for _ in range(2)]
    (0.25 * losses[0] + 2.0 * losses[1]).backward()
    close(model, gradients, 2.25)


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_passes_are_told_apart(reentrant: bool | None) -> None:
    """In the order of the forward passes, of other lengths, with one that is kept and never used, and twice."""
    model = family("glm4_moe")
    add_auxiliary_loss(model, expert=1.0)
    first, second = ({"input_ids": IDS, "labels": IDS}, {"input_ids": IDS[:2, :5], "labels": IDS[:2, :5]})

    def gradients(*batches: dict[str, torch.Tensor]) -> torch.Tensor:
        model.zero_grad()
        kept = [model(**batch, use_cache=False).loss for batch in batches]
        for loss in kept:
            loss.backward()
        return gate_gradients(model)

    expected = gradients(first) + gradients(second)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_same(gradients(first, second), expected)
    model.zero_grad()
    loss, unused = (model(**batch, use_cache=False).loss for batch in (first, second))
    loss.backward()
    alone = gate_gradients(model)
    assert_same(alone, expected - gradients(second))
    assert unused.requires_grad
    if reentrant is not True:  # a reentrant checkpoint frees what it has computed again
        model.zero_grad()
        loss = model(**first, use_cache=False).loss
        loss.backward(retain_graph=True)
        loss.backward()
        assert_same(gate_gradients(model), 2 * alone)


def gate_gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([layer.gate.weight.grad.flatten() for layer in find_moe_layers(model)]).clone()


def test_other_ways_to_a_gradient() -> None:
    model = family("qwen3_moe")
    add_auxiliary_loss(model, expert=1.0)
    gates = [layer.gate.weight for layer in find_moe_layers(model)]
    outputs = model(input_ids=IDS, labels=IDS, use_cache=False)
    outputs.loss.backward(retain_graph=True)
    expected = gate_gradients(model)
    found = torch.autograd.grad(outputs.loss, gates, retain_graph=True)
    assert_same(torch.cat([gradient.flatten() for gradient in found]), expected)
    # Another loss of the same pass has nothing of the balance losses.
    model.zero_grad()
    outputs.logits.square().mean().backward()
    alone = gate_gradients(model)
    add_auxiliary_loss(model)
    model.zero_grad()
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    assert_same(alone, gate_gradients(model))


def test_what_is_saved_and_taken_back(tmp_path: Any) -> None:
    model = family("glm4_moe")
    before = model.config.to_dict()
    add_auxiliary_loss(model, expert=1e-3, z=1e-4)
    assert model.config.router_aux_loss_coef == 1e-3
    add_auxiliary_loss(model)
    assert model.config.to_dict() == before


def test_a_share_of_the_items() -> None:
    model = family("qwen3_moe")
    labels = IDS.masked_fill(MASK == 0, -100)
    items = int((labels[:, 1:] != -100).sum())
    task, losses, _ = expected_of(model, num_items_in_batch=4 * items)
    add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    outputs = model(input_ids=IDS, attention_mask=MASK, labels=labels, use_cache=False, num_items_in_batch=4 * items)
    assert_same(outputs.loss.detach().double(), (task + losses / 4).detach())


def test_the_loss_of_the_family_is_not_counted_twice() -> None:
    model = family("qwen3_moe")
    model.config.output_router_logits, model.router_aux_loss_coef = True, 5.0
    task, losses, _ = expected_of(model)
    add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    outputs = model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100), use_cache=False)
    assert_same(outputs.loss.detach().double(), (task + losses).detach())


def test_a_trainer_that_makes_the_loss(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL's DPO: it asks for router logits, and multiplies by the coefficient of the config."""
    monkeypatch.setattr(logging.getLogger("modeling_deepseekmoe"), "propagate", True)
    model = family("qwen3_moe")
    model.config.router_aux_loss_coef = 0.001
    _, losses, gradients = expected_of(model)
    add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    outputs = model(input_ids=IDS, attention_mask=MASK, use_cache=False, output_router_logits=True)
    assert_same(0.001 * outputs.aux_loss.detach().double(), losses.detach())
    labels = IDS.masked_fill(MASK == 0, -100)
    task = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (task + 0.001 * outputs.aux_loss).backward()
    close(model, gradients)
    assert "not trained" not in caplog.text
    model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits.sum().backward()
    assert "The auxiliary losses are not trained" in caplog.text


def test_trainer_logs_them(tmp_path: Any) -> None:
    model = family("glm4_moe")
    add_auxiliary_loss(model, expert=0.1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=3, logging_steps=1, report_to=[], use_cpu=True,
        gradient_accumulation_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RouterStatsCallback()])
    trainer.train()
    logs = trainer.state.log_history[0]
    assert 0.25 < logs["aux_loss"] < 1.0 and logs["aux_loss"] == logs["aux_loss/expert"]  # 0.1 in each of 3 layers
    assert logs["router/max_violation_global"] > 0


def hooks(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_they_can_be_changed_and_removed() -> None:
    model = family("qwen3_moe")
    before = hooks(model)
    add_auxiliary_loss(model, expert=1.0)
    add_auxiliary_loss(model, expert=2.0)
    first = model(input_ids=IDS, labels=IDS).aux_loss
    add_auxiliary_loss(model, expert=1.0)
    assert_same(2 * model(input_ids=IDS, labels=IDS).aux_loss, first)
    add_auxiliary_loss(model)
    assert getattr(model(input_ids=IDS, labels=IDS), "aux_loss", None) is None
    assert hooks(model) == before


@dataclass
class Outputs(CausalLMOutputWithPast):
    """Those of some families."""


def test_outputs_without_the_field() -> None:
    """They keep what other hooks have added, and can be pickled."""
    outputs = Outputs(loss=torch.ones(()), logits=torch.zeros(2))
    outputs["mtp_loss"] = torch.ones(3)
    found = _with_aux_loss(outputs)
    found["aux_loss"] = torch.tensor(0.5)
    again = pickle.loads(pickle.dumps(found))
    for one in (found, again):
        assert isinstance(one, Outputs) and list(one) == ["loss", "logits", "mtp_loss", "aux_loss"]
        assert float(one.aux_loss) == 0.5 and one.mtp_loss.shape == (3,) and float(one.loss) == 1


def test_bad_input(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="expert=-1 is not allowed"):
        add_auxiliary_loss(family("qwen3_moe"), expert=-1)
    with pytest.raises(ValueError, match="num_devices=1 is not allowed with device or communication"):
        add_auxiliary_loss(family("qwen3_moe"), device=1.0)
    with pytest.raises(ValueError, match="Qwen3MoeModel is not allowed: it makes no loss"):
        add_auxiliary_loss(family("qwen3_moe").model, expert=1.0)
    with pytest.raises(ValueError, match="num_devices=3"):
        add_auxiliary_loss(family("qwen3_moe"), device=1.0, num_devices=3)
    with pytest.raises(ValueError, match="the config of this package's models has these losses"):
        add_auxiliary_loss(tiny_model(), expert=1.0)
    with pytest.raises(ValueError, match="it holds no model of transformers"):
        add_auxiliary_loss(nn.Linear(2, 2), expert=1.0)
    with pytest.raises(ValueError, match="PhimoeTopKRouter"):
        add_auxiliary_loss(family("phimoe"), expert=1.0)
