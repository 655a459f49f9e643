"""The model: auxiliary loss on its way to the loss, padding, checkpointing, precision, implementations, heads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import EXPERTS_IMPLEMENTATIONS, MLA, V3_LIKE, Golden
from tolerances import assert_same
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, expert_balance_loss, take_router_load
from modeling_deepseekmoe.modeling_pretrained import DeepseekMoeHead

VARIANTS = {"mha": {}, "mla": MLA, "mla-noaux": V3_LIKE, "batch-wise": {"seq_aux": False}}
ids = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(5))


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of 11, 7 and 4 real tokens, padded to 11."""
    mask = torch.zeros(3, 11, dtype=torch.long)
    batch = torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate((11, 7, 4)):
        where = slice(11 - length, 11) if side == "left" else slice(0, length)
        mask[row, where], batch[row, where] = 1, ids[row, :length]
    return batch, mask


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_loss_includes_the_auxiliary_loss_and_evaluation_does_not(tiny_model: Callable, variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    training = model(ids, labels=ids)
    evaluation = model.eval()(ids, labels=ids)
    assert training.aux_loss > 0 and evaluation.aux_loss is None
    assert_same(training.loss, evaluation.loss + training.aux_loss)
    requested = model(ids, labels=ids, output_router_logits=True)
    assert_same(requested.aux_loss, training.aux_loss)
    assert_same(requested.loss, evaluation.loss)


def test_auxiliary_loss_without_labels_and_switched_off(tiny_model: Callable) -> None:
    assert tiny_model()(ids).aux_loss > 0 and tiny_model()(ids).loss is None
    assert tiny_model(aux_loss_alpha=0.0)(ids).aux_loss == 0
    assert tiny_model(n_routed_experts=0)(ids).aux_loss == 0


def test_layers_of_another_pipeline_stage(tiny_model: Callable) -> None:
    """They hand on the hidden states alone; the layers that are here count."""

    class Identity(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return hidden_states

    model = tiny_model()
    model.model.layers[1] = Identity()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    counts = model.model.router_load.take().tokens_per_expert
    assert counts.sum(1).tolist() == [0, ids.numel() * 3] and outputs.aux_loss > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_router_logits_are_raw(tiny_model: Callable, variant: str) -> None:
    model = tiny_model(**VARIANTS[variant]).eval()
    gate_inputs = []
    for layer in model.config.moe_layers:
        model.model.layers[layer].mlp.gate.register_forward_pre_hook(lambda _, args: gate_inputs.append(args[0]))
    logits = model(ids, output_router_logits=True).router_logits
    assert len(logits) == len(model.config.moe_layers) == 2
    for layer, layer_input, layer_logits in zip(model.config.moe_layers, gate_inputs, logits, strict=True):
        weight = model.model.layers[layer].mlp.gate.weight
        assert_same(layer_logits, layer_input @ weight.T)
    assert model(ids).router_logits is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_counts_nowhere(tiny_model: Callable, side: str, variant: str) -> None:
    """The auxiliary loss of a padded batch is that of its sequences without padding."""
    model = tiny_model(**VARIANTS[variant], num_hidden_layers=2)  # one MoE layer
    batch, mask = padded_batch(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    aux_loss = model(batch, attention_mask=mask, position_ids=positions).aux_loss
    singles = [model(ids[row : row + 1, :length], output_router_logits=True) for row, length in enumerate((11, 7, 4))]
    if model.config.seq_aux:
        expected = torch.stack([single.aux_loss for single in singles]).mean()
    else:
        scores = torch.cat([single.router_logits[0] for single in singles]).softmax(-1)[None]
        expected = expert_balance_loss(scores, scores.topk(3).indices, model.config.aux_loss_alpha)
    assert_same(aux_loss, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(tiny_model: Callable, variant: str, use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model(**VARIANTS[variant], aux_loss_alpha=1.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {**found, "loss": outputs.loss.detach(), "aux_loss": outputs.aux_loss.detach()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain["model.layers.1.mlp.gate.weight"].abs().max() > 0
    for name, gradient in plain.items():
        assert_same(checkpointed[name], gradient, name)


def test_the_auxiliary_loss_alone_reaches_the_gate_under_reentrant_checkpointing(tiny_model: Callable) -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    outputs = model(ids, output_router_logits=True)
    assert not outputs.router_logits[0].requires_grad  # a limit that the README names
    outputs.aux_loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("variant", ["mha", "mla-noaux"])
@pytest.mark.parametrize("implementation", EXPERTS_IMPLEMENTATIONS[1:])
def test_experts_implementations_agree(
    tiny_model: Callable, count_calls: Callable, variant: str, implementation: str
) -> None:
    def run(name: str) -> dict[str, torch.Tensor]:
        calls, model = count_calls(name), tiny_model(**VARIANTS[variant])
        model.set_experts_implementation(name)
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 2
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    reference, other = run("eager"), run(implementation)
    for name, gradient in reference.items():
        assert_same(other[name], gradient, name)


@pytest.mark.parametrize(("name", "variant"), [
    ("sdpa", "mha"), ("sdpa", "mla"), ("flex_attention", "mha"),
    pytest.param("flex_attention", "mla", marks=pytest.mark.slow),  # it compiles itself, for most of a minute
])  # fmt: skip
@torch.no_grad()
def test_attention_implementations_agree(tiny_model: Callable, name: str, variant: str) -> None:
    model = tiny_model(**VARIANTS[variant]).eval()
    batch, mask = padded_batch("left")
    logits = []
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        logits.append(model(batch, attention_mask=mask).logits[mask.bool()])
    assert_same(*logits)


def test_a_head_multiplies_few_rows_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    head, ordinary = DeepseekMoeHead(24, 50, bias=False), []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *args: ordinary.append(1) or forward(*args))
    for shape in ((2, 1), (1, 3), (4, 8)):
        hidden = torch.randn(*shape, 24)
        with torch.no_grad():
            logits = head(hidden)
        assert logits.is_contiguous() and not ordinary
        assert_same(logits, hidden @ head.weight.T)
    with torch.no_grad():
        head(torch.randn(1, 24)), head(torch.randn(33, 24))
    head(torch.randn(2, 24)).sum().backward()
    with torch.no_grad():
        head.bfloat16()(torch.randn(2, 24, dtype=torch.bfloat16))
    assert head.weight.grad is not None and len(ordinary) == 4


def test_eager_experts_match_a_loop_over_tokens(tiny_model: Callable) -> None:
    experts = tiny_model().eval().model.layers[1].mlp.experts
    experts.config._experts_implementation = "eager"
    hidden, chosen = torch.randn(7, 32), torch.stack([torch.randperm(8)[:3] for _ in range(7)])
    chosen[0, 2] = 8  # the id that stands for an expert of another rank
    weights = torch.rand(7, 3)
    expected = torch.zeros(7, 32)
    for token in range(7):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            if expert < 8:
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                expected[token] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    assert_same(experts(hidden, chosen, weights), expected)
    assert experts(hidden[:0], chosen[:0], weights[:0]).shape == (0, 32)


def test_hidden_states_and_attentions(tiny_model: Callable) -> None:
    model = tiny_model(**MLA).eval()
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(3, 11, 32)] * 4
    assert [tuple(attention.shape) for attention in outputs.attentions] == [(3, 4, 11, 11)] * 3


def test_router_stays_float32_under_autocast(tiny_config: Callable[..., DeepseekMoeConfig]) -> None:
    for router_dtype, expected in (("float32", torch.float32), ("auto", torch.bfloat16)):
        torch.manual_seed(0)
        model = DeepseekMoeForCausalLM(tiny_config(router_dtype=router_dtype)).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(ids, output_router_logits=True)
        assert {logits.dtype for logits in outputs.router_logits} == {expected}


def test_auto_router_dtype_follows_the_model(tiny_model: Callable) -> None:
    model = tiny_model(router_dtype="auto").to(torch.bfloat16).eval()
    assert model(ids, output_router_logits=True).router_logits[0].dtype == torch.bfloat16
    model = tiny_model(router_dtype="float32").to(torch.bfloat16).eval()
    outputs = model(ids, output_router_logits=True)
    assert outputs.router_logits[0].dtype == torch.float32 and outputs.logits.dtype == torch.bfloat16


@pytest.mark.parametrize(("variant", "implementation"), [("mha", "batched_mm"), ("mla-noaux", "grouped_mm")])
def test_compiled_equals_eager(tiny_model: Callable, variant: str, implementation: str) -> None:
    model = tiny_model(**VARIANTS[variant]).eval()
    model.set_experts_implementation(implementation)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected, found = model(ids, use_cache=False).logits, compiled(ids, use_cache=False).logits
    assert_same(found, expected)


def test_compiled_training_step_equals_eager(tiny_model: Callable) -> None:
    def step(compiled: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model = tiny_model()
        model.set_experts_implementation("batched_mm")  # 5.17 cannot compile the backward of grouped_mm on a CPU
        forward = torch.compile(model, fullgraph=True) if compiled else model
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return gradients, take_router_load(model).tokens_per_expert

    (gradients, counts), (found_gradients, found_counts) = step(False), step(True)
    assert torch.equal(found_counts, counts)
    for (name, expected), found in zip(gradients.items(), found_gradients.values(), strict=True):
        assert_same(found, expected, name)


def test_sequence_classification(tiny_config: Callable[..., DeepseekMoeConfig]) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3)).train()
    labels = torch.tensor([0, 2, 1])
    logits = {}
    for side in ("left", "right"):
        batch, mask = padded_batch(side)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = model(batch, attention_mask=mask, position_ids=positions, labels=labels)
        logits[side] = outputs.logits
        task_loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        assert_same(outputs.loss, task_loss + outputs.aux_loss)
    assert_same(logits["left"], logits["right"])
    without_mask = model(padded_batch("right")[0]).logits  # found by the padding token
    assert_same(without_mask, logits["right"])
    model.config.pad_token_id = None
    assert model(ids[:1]).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"attention_mask=None is not allowed .*pad_token_id"):
        model(ids)


def test_token_classification(tiny_config: Callable[..., DeepseekMoeConfig]) -> None:
    model = AutoModelForTokenClassification.from_config(tiny_config(num_labels=5)).train()
    labels = torch.randint(5, ids.shape)
    labels[:, 0] = -100
    outputs = model(ids, labels=labels)
    task_loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    assert_same(outputs.loss, task_loss + outputs.aux_loss)
    for rows, share in ((slice(0, 1), 10 / 30), (slice(1, 3), 20 / 30)):
        part = model(ids[rows], labels=labels[rows], num_items_in_batch=torch.tensor(30))
        task_loss = torch.nn.functional.cross_entropy(part.logits.flatten(0, 1), labels[rows].flatten())
        assert_same(part.loss, (task_loss + part.aux_loss) * share)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]])),
        ("regression", torch.randn(3, 3)),
    ],
)
def test_accumulated_sequence_classification_equals_whole(
    tiny_config: Callable[..., DeepseekMoeConfig], problem: str, labels: torch.Tensor
) -> None:
    torch.manual_seed(0)
    config = tiny_config(num_labels=3, problem_type=problem)
    model = AutoModelForSequenceClassification.from_config(config).train()
    batch, mask = padded_batch("right")
    items = (labels != -100).sum()  # as Trainer counts them
    parts = [model(batch[row], attention_mask=mask[row], labels=labels[row], num_items_in_batch=items).loss
             for row in (slice(0, 2), slice(2, 3))]  # fmt: skip
    assert_same(sum(parts), model(batch, attention_mask=mask, labels=labels).loss)


def test_only_one_kind_of_input(tiny_model: Callable) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        tiny_model()(None)
    embeddings = tiny_model().model.embed_tokens(ids)
    with pytest.raises(ValueError, match="exactly one"):
        tiny_model()(ids, inputs_embeds=embeddings)


def test_tied_embeddings(tiny_model: Callable, tmp_path) -> None:
    model = tiny_model(tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = DeepseekMoeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_initialisation(tiny_model: Callable) -> None:
    model = tiny_model(**V3_LIKE, hidden_size=256, initializer_range=0.02)
    block = model.model.layers[1].mlp
    for parameter in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(block.gate.e_score_correction_bias, torch.zeros(8))


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half", "saved and loaded", "meta"])
def test_the_bias_stays_float32_whatever_the_model_becomes(tiny_model: Callable, tmp_path: Path, cast: str) -> None:
    model = tiny_model(**V3_LIKE)
    value = torch.randn(8) * 1e-3 + 0.5
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(value)
    if cast == "meta":
        with torch.device("meta"):
            empty = DeepseekMoeForCausalLM(model.config).to(torch.bfloat16)
        model = empty.to_empty(device="cpu")
        value = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    elif cast == "saved and loaded":
        model.bfloat16().save_pretrained(tmp_path)
        model = DeepseekMoeForCausalLM.from_pretrained(tmp_path)
    else:
        model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(bias.nan_to_num(), value.nan_to_num())
    assert model.lm_head.weight.dtype != torch.float32
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()


def test_fields_set_after_the_config_was_made_are_checked_too(tiny_config: Callable[..., DeepseekMoeConfig]) -> None:
    config = tiny_config()
    config.num_experts_per_tok = 20
    with pytest.raises(ValueError, match=r"num_experts_per_tok=20 .* n_routed_experts=8"):
        DeepseekMoeForCausalLM(config)


def test_config_and_call_agree_on_router_logits(tiny_model: Callable) -> None:
    model = tiny_model(output_router_logits=True).eval()
    for outputs in (model(ids), model(ids, output_router_logits=None)):
        assert outputs.aux_loss > 0


@pytest.mark.parametrize("name", ["v1-mha", "v3-noaux"])
def test_parallel_plans_name_existing_modules(name: str) -> None:
    import re

    model = Golden(name).model()
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    expert_plan = model.config.base_model_ep_plan or {}  # transformers 5.17 has none
    for plan in (model.tp_plan, {f"model.{key}": value for key, value in expert_plan.items()}):
        for pattern in plan:
            regex = re.compile(pattern.replace(".", r"\.").replace("*", r"\d+"))
            assert any(regex.fullmatch(candidate) for candidate in names), pattern
