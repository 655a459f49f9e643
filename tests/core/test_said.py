"""What is given and has no effect is refused, or said once."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import GOLDEN_ROOT, TINY, V3_LIKE, Golden
from dense_models import dense_model
from peft import get_peft_model
from typer.testing import CliRunner

from modeling_deepseekmoe import (
    DeepseekConfig,
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekMoeForTokenClassification,
    DeepseekV2Config,
    ExpertSelection,
    expert_lora_config,
    inspect_model,
    prepare_esft,
    sharding_of_launch,
    take_router_load,
    update_router_bias,
)
from modeling_deepseekmoe.analysis.inspection import report_on
from modeling_deepseekmoe.cli.app import app
from modeling_deepseekmoe.conversion import UpcyclingPlan, convert, merge_adapter, upcycle_model

IDS = torch.arange(3, 12)[None]
V1 = str(GOLDEN_ROOT / "v1-mha")


# ----------------------------------------------------------------------------------------------------- configs, models
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DeepseekMoeConfig(**TINY, n_group=4, topk_group=1), "n_group=4 has no effect: with topk_group=1"),
        (lambda: DeepseekMoeConfig(**{**TINY, "num_hidden_layers": 1}), "n_routed_experts=8 has no effect: none of"),
        (lambda: DeepseekConfig(**TINY, routed_scaling_factor=16.0), "routed_scaling_factor=16.0 has no effect"),
        (
            lambda: DeepseekV2Config(
                **{**TINY, "num_key_value_heads": 4},
                norm_topk_prob=True,
                routed_scaling_factor=2.0,
                topk_method="greedy",
            ),
            "routed_scaling_factor=2.0 has no effect: with norm_topk_prob=true",
        ),
        (lambda: DeepseekMoeConfig(**TINY, n_group=1, topk_group=1), None),
        (lambda: DeepseekMoeConfig(**{**TINY, "n_routed_experts": None}), None),
    ],
)
def test_fields_without_effect(make: Callable, said: str | None, warnings_of_package: list[str]) -> None:
    make(), make()
    assert len(warnings_of_package) == (said is not None)
    assert said is None or said in warnings_of_package[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_lora_rank": 8}, "q_lora_rank=8 is not allowed: it belongs to attention_type='mla', which kv_lora_rank"),
        ({"n_group": -3}, "n_group=-3 is not allowed: it must be an integer of at least 1"),
        ({"num_experts": 8, "num_local_experts": 16}, "num_local_experts=16 is not allowed: n_routed_experts has the"),
    ],
)
def test_fields_that_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepseekMoeConfig(**{**TINY, **fields})


def test_no_token_of_padding(tiny_model: Callable) -> None:
    """-1 stands for none in many configs; torch would take it for the last token."""
    model = tiny_model(pad_token_id=-1)
    model(torch.full((1, 4), 95), labels=torch.full((1, 4), 95)).loss.backward()
    assert model.model.embed_tokens.weight[95].any() and model.model.embed_tokens.weight.grad[95].any()


def test_classifiers_return_and_drop_what_they_are_told(tiny_config: Callable) -> None:
    for model_class in (DeepseekMoeForSequenceClassification, DeepseekMoeForTokenClassification):
        model = model_class(tiny_config(num_labels=3)).eval()
        assert len(model(IDS, output_router_logits=True).router_logits) == 2
        assert model(IDS).router_logits is None
    model = DeepseekMoeForTokenClassification(tiny_config(classifier_dropout=0.5)).train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)


# -------------------------------------------------------------------------------------------------- training, adapters
def test_counts_that_are_not_there_on_one_of_many_ranks(
    tiny_model: Callable, tmp_path: Path, warnings_of_package: list[str]
) -> None:
    model = tiny_model(**V3_LIKE)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model(IDS, labels=IDS).loss.backward()
        assert take_router_load(model).tokens == IDS.numel() and not warnings_of_package
        update_router_bias(model)
    finally:
        dist.destroy_process_group()
    assert (
        "only one may take the counts" in warnings_of_package[0]
        and "This rank counts nothing" in warnings_of_package[0]
    )


def test_selections(tiny_model: Callable, tmp_path: Path) -> None:
    file = tmp_path / "esft.json"
    for content, message in (
        ({"shared_experts": "false"}, "shared_experts='false' is not allowed: it must be true or false"),
        ({"non_expert_module": True}, "the field 'non_expert_module' is not allowed: there are experts, shared_exp"),
    ):
        file.write_text(json.dumps({"experts": {"1": [0]}, **content}))
        with pytest.raises(ValueError, match=message):
            ExpertSelection.of(file)
    with pytest.raises(ValueError, match="shared_experts=True is not allowed: DeepseekMoeForCausalLM has none"):
        prepare_esft(tiny_model(n_shared_experts=None), ExpertSelection({1: [0]}, shared_experts=True))


def test_dropout_that_no_file_holds(tiny_model: Callable, tmp_path: Path, warnings_of_package: list[str]) -> None:
    model = tiny_model()
    adapted = get_peft_model(model, expert_lora_config(model, r=2, lora_dropout=0.25))
    adapted.save_pretrained(tmp_path)
    adapted.save_pretrained(tmp_path)
    said = [text for text in warnings_of_package if "lora_dropout=0.25 is saved as 0" in text]
    assert len(said) == 1 and "optimize_expert_lora(model, lora_dropout=0.25)" in said[0]


def test_options_of_weighted_sums(tiny_model: Callable) -> None:
    model = tiny_model()
    adapted = get_peft_model(model, expert_lora_config(model, r=2))
    from modeling_deepseekmoe import optimize_expert_lora

    with pytest.raises(ValueError, match="svd_driver='gesvd' is not allowed on stacked experts"):
        optimize_expert_lora(adapted).add_weighted_adapter(["default"], [1.0], "sum", svd_driver="gesvd")


def test_one_process_with_sizes_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert sharding_of_launch() is None
    with pytest.raises(ValueError, match="tp_size=2, ep_size=8 is not allowed for one process"):
        sharding_of_launch(tp_size=2, ep_size=8)


# -------------------------------------------------------------------------------------------------- files and commands
def test_noise_that_is_not_applied(warnings_of_package: list[str]) -> None:
    plan = UpcyclingPlan(shared_width=16, num_shards=2, num_copies=2, noise=0.5)
    experts = upcycle_model(dense_model("llama"), plan).model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj[0], experts.down_proj[2])
    assert "plan.noise=0.5 is not applied" in warnings_of_package[0]
    experts = upcycle_model(dense_model("llama"), plan, noise=True).model.layers[0].mlp.experts
    assert not torch.equal(experts.down_proj[0], experts.down_proj[2]) and len(warnings_of_package) == 1


def test_files_beside_the_weights(v1: Golden, tiny_model: Callable, tmp_path: Path) -> None:
    """Code that a tokenizer names is no model's, and stays with it; chat templates may lie in a folder."""
    base = tmp_path / "base"
    convert(v1.folder, base)
    (base / "tokenization_x.py").write_text("X = 1")
    (base / "modeling_x.py").write_text("X = 1")
    auto_map = {"AutoTokenizer": ["tokenization_x.X", None]}
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    convert(base, tmp_path / "other", to="deepseekmoe")
    kept = {str(path.relative_to(tmp_path / "other")) for path in (tmp_path / "other").rglob("*") if path.is_file()}
    assert {"tokenization_x.py", "additional_chat_templates/tools.jinja"} <= kept and "modeling_x.py" not in kept
    adapter = tmp_path / "adapter"
    model = DeepseekMoeForCausalLM.from_pretrained(tmp_path / "other")
    adapted = get_peft_model(model, expert_lora_config(model, r=2))
    adapted.peft_config["default"].base_model_name_or_path = "someone/else"
    adapted.save_pretrained(adapter)
    (adapter / "chat_template.jinja").write_text("{{ y }}")
    lines: list[str] = []
    merge_adapter(tmp_path / "other", adapter, tmp_path / "merged", report=lines.append)
    assert (tmp_path / "merged" / "additional_chat_templates" / "tools.jinja").is_file()
    assert any("chat_template.jinja of the adapter" in line and "not taken" in line for line in lines)
    assert any("someone/else" in line and "other" in line for line in lines)


def test_what_a_card_leaves_out(monkeypatch: pytest.MonkeyPatch, warnings_of_package: list[str]) -> None:
    from modeling_deepseekmoe import ModelCardCallback

    callback, written = ModelCardCallback(license="mit"), []
    trainer = SimpleNamespace(model=SimpleNamespace(model_tags=["a"]), add_callback=lambda callback: None)
    monkeypatch.setattr(callback, "_write_card", written.append)
    callback.add_to(trainer)
    trainer.create_model_card(model_name="x", dataset_name="y", tags="b")
    assert written == [["a", "b"]] and not warnings_of_package
    trainer.create_model_card(license="apache-2.0", dataset="z", tags=["c"])
    assert written[1] == ["a", "c"] and "dataset, license is left out of the card" in warnings_of_package[0]


def test_a_manifest_of_what_does_not_hold(tmp_path: Path) -> None:
    convert(V1, tmp_path / "one")
    result = CliRunner().invoke(
        app, ["verify", str(tmp_path / "one"), str(GOLDEN_ROOT / "v1-gqa-norm"), "--write-manifest"]
    )
    assert result.exit_code == 1 and not (tmp_path / "one" / "tensors.sha256.json").exists()


def test_the_head_that_is_counted(tiny_config: Callable, tmp_path: Path) -> None:
    model = DeepseekMoeForSequenceClassification(tiny_config(num_labels=3))
    model.save_pretrained(tmp_path)
    assert inspect_model(tmp_path).total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report_on(tiny_config(), "x").total_parameters == sum(
        parameter.numel() for parameter in DeepseekMoeForCausalLM(tiny_config()).parameters()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", V1, "--method", "nonsense", "--tokens", "5"], "--method, --tokens: not allowed without --gpus"),
        (["verify", V1, V1, "--tolerance", "1"], "--tolerance: not allowed without --logits"),
        (
            ["export-adapter", V1, "out", "--layout", "per-expert", "--num-experts", "7"],
            "num_experts=7 is not allowed",
        ),
        (["push", V1, "me/x", "--column", "y", "--dry-run"], "--column: not allowed without --data"),
    ],
)
def test_options_of_commands(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.stderr
