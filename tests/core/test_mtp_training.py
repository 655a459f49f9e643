"""The loss of multi-token prediction against a loop over tokens, and what else training does with its layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MLA, V3_LIKE
from tolerances import ACCUMULATED, DOUBLE, SAME_COMPUTATION
from training import Rows, arguments
from transformers import Trainer

from modeling_deepseekmoe import DeepseekMoeForCausalLM, LoadBalancingCallback, add_mtp

DENSE = {"n_routed_experts": None, "attention_type": "mha"}
NO_LOSSES = {"aux_loss_alpha": 0.0}


def run_alone(model: DeepseekMoeForCausalLM, ids: torch.Tensor, depth: int) -> list[torch.Tensor]:
    """The log-probabilities of every depth (S - k, V) for one document by itself, on sequences that are cut off."""
    decoder = model.model
    hidden = decoder(ids[None]).last_hidden_state
    found = []
    for number in range(1, depth + 1):
        layer, length = decoder.layers[model.config.num_hidden_layers + number - 1], len(ids) - number
        if length <= 0:
            break
        embeds, positions = decoder.embed_tokens(ids[None, number:]), torch.arange(length)[None]
        mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
        hidden = layer(
            hidden[:, :length], embeds, attention_mask=mask, position_ids=positions,
            position_embeddings=decoder.rotary_emb(embeds, positions),
        )[0]  # fmt: skip
        found.append(model.lm_head(hidden)[0].log_softmax(dim=-1))
    return found


def loop_over_tokens(
    model: DeepseekMoeForCausalLM, documents: list[tuple[torch.Tensor, torch.Tensor]], depth: int, items: int
) -> torch.Tensor:
    """The loss of every depth: a sum over the tokens of documents (ids and labels), divided by the items."""
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(depth)]
    for ids, labels in documents:
        for number, log_probabilities in enumerate(run_alone(model, ids, depth), start=1):
            for place in range(len(ids) - number - 1):
                label = int(labels[place + number + 1])
                if label != -100:
                    losses[number - 1] = losses[number - 1] - log_probabilities[place, label]
    return torch.stack(losses) / items


def documents_of(*lengths: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Documents with labels of which some are -100."""
    generator = torch.Generator().manual_seed(5)
    documents = []
    for length in lengths:
        ids = torch.randint(3, 90, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.2, -100)
        labels[0] = -100  # nothing predicts it, unless padding or another document stands before
        documents.append((ids, labels))
    return documents


def batch_of(documents: list[tuple[torch.Tensor, torch.Tensor]], kind: str) -> dict[str, Any]:
    """The documents padded on a side, or packed in one row."""
    if kind == "packed":
        positions = torch.cat([torch.arange(len(ids)) for ids, _ in documents])
        ids = torch.cat([ids for ids, _ in documents])
        labels = torch.cat([labels for _, labels in documents])
        # Without a cache, or else transformers does not look for documents.
        return {"input_ids": ids[None], "labels": labels[None], "position_ids": positions[None], "use_cache": False}
    width = max(len(ids) for ids, _ in documents)

    def padded(values: torch.Tensor, filling: int) -> torch.Tensor:
        missing = width - len(values)
        return F.pad(values, (missing, 0) if kind == "left" else (0, missing), value=filling)

    batch = {
        "input_ids": torch.stack([padded(ids, 0) for ids, _ in documents]),
        "attention_mask": torch.stack([padded(torch.ones_like(ids), 0) for ids, _ in documents]),
        "labels": torch.stack([padded(labels, -100) for _, labels in documents]),
    }
    positions = (batch["attention_mask"].cumsum(dim=-1) - 1).clamp(min=0)
    return batch | ({"position_ids": positions} if kind == "left" else {})


def items_of(documents: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(int((labels[1:] != -100).sum()) for _, labels in documents)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["left", "right", "packed"])
def test_loss_and_gradients_against_a_loop_over_tokens(tiny_model: Callable, kind: str, depth: int) -> None:
    model = tiny_model(**DENSE, num_nextn_predict_layers=depth, mtp=True, mtp_loss_decay=0.6).double()
    documents = documents_of(9, 2, 6, 1, 11)
    batch, weights = batch_of(documents, kind), torch.tensor(model.config.mtp_loss_weights, dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(0.3)
    outputs = model(**batch)
    expected = loop_over_tokens(model, documents, depth, items_of(documents))
    assert (outputs.mtp_loss - expected).abs().max() <= DOUBLE
    assert (expected > 0).all()
    found, wanted = gradients(model, outputs.mtp_loss @ weights), gradients(model, expected @ weights)
    assert found.keys() >= wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted.get(name, torch.zeros_like(gradient))).abs().max() <= DOUBLE, name
    outputs = model(**batch)
    task = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert abs(outputs.loss - task - outputs.mtp_loss @ weights) <= SAME_COMPUTATION
    with torch.no_grad():
        evaluated = model.eval()(**batch)
    assert abs(evaluated.loss - task) <= SAME_COMPUTATION and torch.equal(evaluated.mtp_loss, outputs.mtp_loss)


@pytest.mark.parametrize("detach", [False, True], ids=["joint", "detached"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["stored", "non-reentrant", "reentrant"])
def test_both_modes_of_checkpointing(tiny_model: Callable, reentrant: bool | None, detach: bool) -> None:
    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(**V3_LIKE, num_nextn_predict_layers=2, mtp=True, mtp_detach=detach, **NO_LOSSES)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        found = gradients(model, model(**batch_of(documents_of(9, 6), "right")).loss)
        return found | {"counts": model.model.router_load.take().tokens_per_expert}

    expected = run(False)
    if reentrant is not None:
        found = run(True)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() <= SAME_COMPUTATION, name
    assert expected["model.layers.4.eh_proj.weight"].abs().max() > 0
    assert expected["counts"].sum(dim=1).tolist() == [15 * 3, 15 * 3, 13 * 3, 11 * 3]


def test_detached_layers_leave_the_model_alone(tiny_model: Callable) -> None:
    batch = batch_of(documents_of(9, 6), "right")
    plain = tiny_model(**NO_LOSSES)
    torch.manual_seed(1)
    add_mtp(plain)
    plain.config.mtp_detach = True
    found = gradients(plain, plain(**batch).loss)
    plain.config.mtp_loss_coef = 0.0
    alone = gradients(plain, plain(**batch).loss)
    own = {name for name in found if name.startswith("model.layers.3.")}
    assert own and not own & alone.keys() and alone.keys() == found.keys() - own
    for name, gradient in alone.items():
        assert torch.equal(gradient, found[name]), name


@pytest.mark.parametrize("fields", [{}, MLA | {"n_shared_experts": None}, V3_LIKE], ids=["mha", "mla", "v3"])
def test_accumulation_gives_the_loss_of_the_whole_batch(tiny_model: Callable, fields: dict[str, Any]) -> None:
    model = tiny_model(**fields, num_nextn_predict_layers=2, mtp=True, **NO_LOSSES).double()
    documents = documents_of(9, 4, 12, 7, 3, 11, 8, 5)
    whole = gradients(model, model(**batch_of(documents, "right")).loss)
    model.zero_grad()
    for first in range(0, 8, 2):
        model(
            **batch_of(documents[first : first + 2], "right"), num_items_in_batch=items_of(documents)
        ).loss.backward()
    for name, parameter in model.named_parameters():
        if name in whole:
            assert (parameter.grad - whole[name]).abs().max() <= ACCUMULATED, name


@pytest.mark.parametrize("accumulation", [1, 4])
def test_trainer_logs_and_balances(tiny_model: Callable, tmp_path: Path, accumulation: int) -> None:
    model = tiny_model(**V3_LIKE, num_nextn_predict_layers=1, mtp=True, sequence_balance_alpha=1e-3)
    ids = torch.stack([ids for ids, _ in documents_of(*[10] * 16)])
    before = model.model.layers[3].mlp.gate.e_score_correction_bias.clone()
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=8 // accumulation,
                  gradient_accumulation_steps=accumulation),
        train_dataset=Rows(input_ids=ids, labels=ids),
        callbacks=[LoadBalancingCallback()],
    )  # fmt: skip
    trainer.train()
    step = (model.model.layers[3].mlp.gate.e_score_correction_bias - before).abs()
    assert step.max() > 0 and torch.isfinite(step).all()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(
        {"mtp/loss_1", "mtp/agreement_1", "router/max_violation_global"} <= log.keys() for log in logs
    )


def test_losses_of_the_gates_are_among_the_others(tiny_model: Callable) -> None:
    batch = batch_of(documents_of(9, 6), "right")
    model = tiny_model(num_nextn_predict_layers=1, mtp=True)
    outputs = model(**batch)
    model.config.mtp_loss_coef = 0.0
    without = model(**batch)
    assert outputs.aux_loss > without.aux_loss > 0
    gate = "model.layers.3.mlp.gate.weight"
    assert gate in gradients(model, outputs.aux_loss)


def test_a_loss_of_somebody_else_is_said_once(tiny_model: Callable, warnings_of_package: list[str]) -> None:
    model, batch = tiny_model(num_nextn_predict_layers=1, mtp=True), batch_of(documents_of(9, 6), "right")
    for _ in range(3):
        model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits.sum().backward()
    assert sum("are loaded and NOT trained" in message for message in warnings_of_package) == 1
    warnings_of_package.clear()
    model = tiny_model(num_nextn_predict_layers=1, mtp=True)
    for _ in range(3):
        model(**batch).loss.backward()
    assert not any("NOT trained" in message and "multi-token" in message for message in warnings_of_package)


def test_fields_that_are_not_allowed(tiny_config: Callable) -> None:
    for field, value in (("mtp_loss_coef", -0.1), ("mtp_loss_decay", 0.0), ("mtp_loss_decay", 1.5), ("mtp_detach", 1)):
        with pytest.raises(ValueError, match=f"{field}={value!r} is not allowed"):
            tiny_config(**{field: value})
