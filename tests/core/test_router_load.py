"""The counts of tokens are whole numbers, and exact, however the training step is made."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import V3_LIKE
from native_models import batch, native_model, reference_counts
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3ForCausalLM as NativeModel

from modeling_deepseekmoe import RouterLoad, RouterStats, take_router_load, track_router_load, update_router_bias
from modeling_deepseekmoe.router_load import RoutingContext

everything = torch.ones_like(batch)
CHECKPOINTING = {"plain": None, "reentrant": True, "non-reentrant": False}


def checkpointed(model: nn.Module, use_reentrant: bool | None) -> nn.Module:
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


@pytest.fixture(params=["ours", "ours-softmax", "native"])
def model(request: pytest.FixtureRequest, tiny_model: Callable) -> nn.Module:
    if request.param == "native":
        model = native_model()
        track_router_load(model)
        return model
    return tiny_model(**(V3_LIKE if request.param == "ours" else {}))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_counts_of_a_step(model: nn.Module, checkpointing: str, accumulate: int, padding: str | None) -> None:
    mask = everything
    if padding:
        lengths = torch.tensor([12, 5, 9, 1, 12, 7, 3, 10])[:, None]
        positions = torch.arange(12)[None]
        mask = (positions < lengths if padding == "right" else positions >= 12 - lengths).long()
    expected = reference_counts(model, batch, mask)
    assert model(batch[:1]).logits is not None  # in training, before the step: taken away
    take_router_load(model)
    checkpointed(model, CHECKPOINTING[checkpointing])
    calls = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *args: calls.append(1))
    for rows, part in zip(batch.chunk(accumulate), mask.chunk(accumulate), strict=True):
        model(rows, attention_mask=part, labels=rows).loss.backward()
    load = take_router_load(model)
    assert torch.equal(load.tokens_per_expert, expected)
    assert load.tokens_per_expert.dtype == torch.long
    assert (load.tokens, load.micro_batches) == (mask.sum(), accumulate)
    assert load.tokens_per_expert.sum(dim=1).tolist() == [int(mask.sum()) * 3] * 2
    assert len(calls) == accumulate * (1 if checkpointing == "plain" else 2)  # recomputed indeed


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_only_some_layers_checkpointed(model: nn.Module, use_reentrant: bool) -> None:
    expected = reference_counts(model, batch, everything)
    layer = model.model.layers[1]
    layer.gradient_checkpointing = True  # the other layers run as they are
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=use_reentrant)
    model(batch, labels=batch).loss.backward()
    assert torch.equal(take_router_load(model).tokens_per_expert, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(tiny_model: Callable, use_reentrant: bool) -> None:
    """With gradients in the first pass it counts once; a reentrant one hides the first pass and counts the second."""
    model = tiny_model(**V3_LIKE)
    expected = reference_counts(model, batch, everything)
    embeddings = model.get_input_embeddings()(batch)
    checkpoint(
        lambda inputs: model(inputs_embeds=inputs).logits, embeddings, use_reentrant=use_reentrant
    ).sum().backward()
    if use_reentrant:
        assert model.model.router_load.load is None  # documented: such a checkpoint is not seen as training
    else:
        assert torch.equal(take_router_load(model).tokens_per_expert, expected)


def test_masks_given_by_position(model: nn.Module) -> None:
    mask = (torch.arange(12)[None] < torch.tensor([12, 5, 9, 1, 12, 7, 3, 10])[:, None]).long()
    expected = reference_counts(model, batch, mask)
    model(batch, mask, labels=batch).loss.backward()
    assert torch.equal(take_router_load(model).tokens_per_expert, expected)


def test_a_mask_that_says_nothing_about_padding(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE)
    causal = torch.ones(12, 12).tril().log()[None, None].expand(8, 1, 12, 12)
    expected = reference_counts(model, batch, everything)
    model(batch, attention_mask=causal, labels=batch)
    assert torch.equal(take_router_load(model).tokens_per_expert, expected)


class HostReads(TorchDispatchMode):
    """Counts what would make a GPU wait for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_host(tiny_model: Callable) -> None:
    """In a training step with all losses, token dropping, statistics and the update; reading happens at the log."""
    model = tiny_model(**V3_LIKE, sequence_balance_alpha=0.1, router_z_loss_alpha=0.1, device_balance_alpha=0.1,
                       communication_balance_alpha=0.1, token_drop_capacity_factor=1.0)  # fmt: skip
    model.set_experts_implementation("batched_mm")
    mask = (torch.arange(12)[None] < torch.tensor([12, 5, 9, 1, 12, 7, 3, 10])[:, None]).long()
    stats = RouterStats(model)
    embeddings, plain = model.get_input_embeddings()(batch).detach(), HostReads()
    masks = causal_mask_of(model, mask)
    with plain:
        records = [layer(embeddings, attention_mask=masks, routing=RoutingContext(mask, None, True, True),
                         position_embeddings=model.model.rotary_emb(embeddings, torch.arange(12)[None]))
                   for layer in model.model.layers]  # fmt: skip
    assert len(records) == 3 and not plain.reads
    model(batch, attention_mask=mask, labels=batch).loss.backward()
    with plain:
        stats.add(update_router_bias(model))
    assert not plain.reads
    with plain:
        stats.summary()
    assert plain.reads


def causal_mask_of(model: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    from transformers.masking_utils import create_causal_mask

    embeddings = model.get_input_embeddings()(batch)
    return create_causal_mask(config=model.config, inputs_embeds=embeddings, attention_mask=mask, past_key_values=None)


def test_packed_sequences(model: nn.Module) -> None:
    """Three sequences in every row, told apart by their positions."""
    positions = torch.tensor([*range(5), *range(4), *range(3)]).repeat(8, 1)
    expected = reference_counts(model, batch, everything, position_ids=positions)
    model(batch, position_ids=positions, labels=batch).loss.backward()
    assert torch.equal(take_router_load(model).tokens_per_expert, expected)


def test_evaluation_and_forwards_without_gradients_do_not_count(model: nn.Module) -> None:
    expected = reference_counts(model, batch, everything)
    model(batch[:4], labels=batch[:4]).loss.backward()
    model.eval()
    model(batch, labels=batch)
    model.generate(batch[:1, :4], max_new_tokens=3, do_sample=False)
    model.train()
    with torch.no_grad():
        model(batch, labels=batch)
    model(batch[4:], labels=batch[4:]).loss.backward()
    assert torch.equal(take_router_load(model).tokens_per_expert, expected)


def test_compiled(model: nn.Module) -> None:
    native = isinstance(model, NativeModel)
    model.set_experts_implementation("batched_mm")
    expected = reference_counts(model, batch, everything)
    # What a graph writes to is settled before inductor, which takes a minute; test_modeling takes one step through it.
    compiled = torch.compile(model, fullgraph=not native, backend="aot_eager")
    for _ in range(3):
        compiled(batch, labels=batch).loss.backward()
    assert torch.equal(take_router_load(model).tokens_per_expert, 3 * expected)


def test_lora_with_a_frozen_gate(model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    expected = reference_counts(model, batch, everything)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"))
    track_router_load(wrapped)
    wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped(batch, attention_mask=everything, labels=batch).loss.backward()
    assert not any(parameter.grad is not None for name, parameter in wrapped.named_parameters() if ".gate." in name)
    assert torch.equal(take_router_load(wrapped).tokens_per_expert, expected)


def test_embeddings_as_input(model: nn.Module) -> None:
    expected = reference_counts(model, batch, everything)
    model(inputs_embeds=model.get_input_embeddings()(batch), labels=batch).loss.backward()
    load = take_router_load(model)
    assert torch.equal(load.tokens_per_expert, expected) and load.tokens == batch.numel()


def test_nothing_counted(model: nn.Module) -> None:
    with torch.no_grad():
        model(batch)
    with pytest.raises(ValueError, match="no token was routed in training"):
        take_router_load(model)


def test_statistics_against_a_loop(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE, sequence_balance_alpha=0.1, router_z_loss_alpha=0.01)
    model.model.layers[1].mlp.gate.e_score_correction_bias[0] = -3.0  # nobody chooses expert 0
    model.model.layers[1].mlp.gate.e_score_correction_bias[1] = -4.0
    stats = RouterStats(model)
    with pytest.raises(ValueError, match="no step to report"):
        stats.summary()
    mask = (torch.arange(12)[None] < torch.tensor([12, 5, 9, 1, 12, 7, 3, 10])[:, None]).long()
    loads, entropies, losses = [], torch.zeros(2), []
    for rows, part in zip(batch.chunk(2), mask.chunk(2), strict=True):
        outputs = model(rows, attention_mask=part, output_router_logits=True)
        for layer, logits in enumerate(outputs.router_logits):
            shares = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
            entropies[layer] += -(shares * shares.log()).sum(-1)[part.flatten().bool()].sum().item()
        losses.append(outputs.aux_loss.item())
        outputs.aux_loss.backward()
        loads.append(take_router_load(model))
        stats.add(loads[-1])
    values, summary = stats.to_dict(), stats.summary()
    counts = torch.stack([load.tokens_per_expert for load in loads])
    batch_violations = [[max(row) / (sum(row) / 8) - 1 for row in load] for load in counts.tolist()]
    global_violations = [max(row) / (sum(row) / 8) - 1 for row in counts.sum(0).tolist()]
    assert values["steps"] == 2 and values["tokens"] == mask.sum() and values["layers"] == [1, 2]
    assert values["tokens_per_expert"] == counts.sum(0).tolist()
    assert values["max_violation_global"] == pytest.approx(global_violations)
    assert values["max_violation_batch"] == pytest.approx(
        [sum(pair) / 2 for pair in zip(*batch_violations, strict=True)]
    )
    assert values["dead_experts"] == [0.25, 0.0]
    assert values["drop_rate"] == [0.0, 0.0]
    assert values["bias_norm"] == pytest.approx([5.0, 0.0])
    assert values["entropy"] == pytest.approx((entropies / mask.sum()).tolist(), rel=1e-5)
    assert values["losses"].keys() == {"expert", "sequence", "router_z"}
    assert summary["aux_loss"] == pytest.approx(sum(losses) / 2)
    assert summary["router/dead_experts"] == 0.125
    assert summary["aux_loss/sequence"] == values["losses"]["sequence"]
    stats.reset()
    assert stats.load is None and stats.steps == 0


def test_load_reduced_without_processes_is_itself() -> None:
    load = RouterLoad.zeros(2, 4)
    assert load.all_reduce() is load
