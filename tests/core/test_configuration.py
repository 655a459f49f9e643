"""The config: official files as they are, each generation's rules, and clear errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MLA, Golden
from transformers import AutoConfig

from modeling_deepseekmoe import DeepseekConfig, DeepseekMoeConfig, DeepseekV2Config, DeepseekV3Config
from modeling_deepseekmoe.configuration import config_from_dict, list_presets, load_config, load_preset


def test_official_files_are_read_as_they_are(golden: Golden) -> None:
    config = AutoConfig.from_pretrained(golden.folder)
    for field, value in golden.config.items():
        if field in ("rope_scaling", "rope_theta", "torch_dtype"):
            continue
        assert getattr(config, field) == value, field
    assert config.rope_parameters["rope_theta"] == golden.config["rope_theta"]
    assert config.attention_type == ("mla" if "kv_lora_rank" in golden.config else "mha")


def test_the_released_16b_file_gets_the_class_defaults_that_it_omits() -> None:
    config = load_preset("deepseek-moe-16b")
    assert (config.aux_loss_alpha, config.seq_aux, config.router_dtype) == (0.001, True, "auto")


def test_round_trip_through_json(golden: Golden) -> None:
    config = AutoConfig.from_pretrained(golden.folder)
    again = config_from_dict(json.loads(config.to_json_string()))
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.rope_parameters == config.rope_parameters


def test_aliases(tiny_config: Callable[..., DeepseekMoeConfig]) -> None:
    config = DeepseekMoeConfig(router_aux_loss_coef=0.5, num_experts=16)
    assert (config.aux_loss_alpha, config.n_routed_experts, config.num_local_experts) == (0.5, 16, 16)
    for given, override in (("num_local_experts", "num_experts"), ("num_experts", "n_routed_experts")):
        assert DeepseekMoeConfig.from_dict({given: 8}, **{override: 16}).n_routed_experts == 16
    with pytest.raises(ValueError, match="num_experts=16 is not allowed: n_routed_experts has the value 8 under"):
        tiny_config(num_experts=16)
    config.router_aux_loss_coef = 0.25
    assert config.aux_loss_alpha == 0.25
    with pytest.raises(ValueError, match="n_routed_experts=2"):
        DeepseekMoeConfig(num_local_experts=2)


@pytest.mark.parametrize(
    ("config_class", "fields", "scaling", "normalizes"),
    [
        (DeepseekConfig, {"norm_topk_prob": True, "routed_scaling_factor": 3.0}, 1.0, True),
        (DeepseekConfig, {"norm_topk_prob": True, "num_experts_per_tok": 1}, 1.0, False),
        (DeepseekV2Config, {"norm_topk_prob": False, "routed_scaling_factor": 3.0}, 3.0, False),
        (DeepseekV2Config, {"norm_topk_prob": True, "routed_scaling_factor": 3.0}, 1.0, True),
        (
            DeepseekV2Config,
            {"norm_topk_prob": True, "num_experts_per_tok": 1, "routed_scaling_factor": 3.0},
            3.0,
            False,
        ),
        (DeepseekV3Config, {"norm_topk_prob": True, "routed_scaling_factor": 3.0}, 3.0, True),
        (DeepseekMoeConfig, {"norm_topk_prob": True, "routed_scaling_factor": 3.0}, 3.0, True),
    ],
)
def test_scaling_rules_by_generation(config_class: type, fields: dict, scaling: float, normalizes: bool) -> None:
    base = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1}
    config = config_class(**{**base, **fields})
    assert (config.gate_scaling_factor, config.gate_normalizes) == (scaling, normalizes)


@pytest.mark.parametrize(
    ("fields", "moe_layers", "shared_width"),
    [
        ({"n_routed_experts": 0}, (), 32),
        ({"n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None}, (), 0),
        ({"n_shared_experts": 0, "num_experts_per_tok": 1, "first_k_dense_replace": 0}, (0, 1, 2), 0),
        (
            {"n_shared_experts": 0, "num_experts_per_tok": 2, "first_k_dense_replace": 0, "moe_layer_freq": 2},
            (0, 2),
            0,
        ),
        ({"n_routed_experts": 64, "num_experts_per_tok": 8, "n_shared_experts": 0}, (1, 2), 0),
        ({"n_routed_experts": 63, "num_experts_per_tok": 7, "n_shared_experts": 1}, (1, 2), 16),
    ],
    ids=["dense", "dense-null", "gshard-top1", "gshard-every-second", "fine-grained", "shared-isolation"],
)
def test_the_systems_that_the_papers_compare(
    tiny_model: Callable, fields: dict, moe_layers: tuple[int, ...], shared_width: int
) -> None:
    import torch

    model = tiny_model(**fields)
    assert model.config.moe_layers == moe_layers
    assert model.config.shared_intermediate_size == shared_width
    outputs = model(torch.arange(12)[None], labels=torch.arange(12)[None])
    outputs.loss.backward()
    assert outputs.loss.isfinite() and bool(outputs.aux_loss > 0) == bool(moe_layers)


WRONG = [
    ({"num_experts_per_tok": 9}, r"num_experts_per_tok=9 .* between 1 and n_routed_experts=8"),
    ({"num_experts_per_tok": 0}, r"num_experts_per_tok=0 .* at least 1"),
    ({"topk_method": "noaux_tc", "n_group": 3, "topk_group": 1}, r"n_group=3 .* divide n_routed_experts=8"),
    ({"topk_method": "noaux_tc", "n_group": 4, "topk_group": 5}, r"topk_group=5 .* between 1 and n_group=4"),
    ({"topk_method": "noaux_tc", "n_group": 4, "topk_group": 1}, r"num_experts_per_tok=3 .* hold only 2"),
    ({"topk_method": "noaux_tc", "n_group": 8, "topk_group": 4}, r"n_group=8 .* at most 4"),
    ({"topk_method": "group_limited_greedy"}, r"n_group=None .* at least 1"),
    ({"scoring_func": "tanh"}, r"scoring_func='tanh' .* 'softmax', 'sigmoid'"),
    ({"topk_method": "gready"}, r"topk_method='gready' .* 'greedy', 'group_limited_greedy', 'noaux_tc'"),
    ({"router_dtype": "bfloat16"}, r"router_dtype='bfloat16' .* 'float32', 'auto'"),
    ({"routed_scaling_factor": 0}, r"routed_scaling_factor=0 .* above 0"),
    ({"attention_type": "mla"}, r"kv_lora_rank=None .* needs kv_lora_rank, qk_nope_head_dim"),
    ({"kv_lora_rank": 16, "v_head_dim": 8}, r"qk_nope_head_dim=None .* qk_nope_head_dim, qk_rope_head_dim is absent"),
    ({**MLA, "num_key_value_heads": 2}, r"num_key_value_heads=2 .* equal num_attention_heads=4"),
    ({**MLA, "qk_rope_head_dim": 3}, r"qk_rope_head_dim=3 .* even"),
    ({"attention_type": "gqa"}, r"attention_type='gqa' .* 'mha', 'mla'"),
    ({"hidden_size": -32}, r"hidden_size=-32 .* at least 1"),
    ({"hidden_size": 33}, r"hidden_size=33 .* multiple of num_attention_heads=4"),
    ({"vocab_size": 0}, r"vocab_size=0 .* at least 1"),
    ({"moe_intermediate_size": -1}, r"moe_intermediate_size=-1 .* at least 1"),
    ({"n_routed_experts": -8}, r"n_routed_experts=-8 .* at least 0"),
    ({"n_shared_experts": -1}, r"n_shared_experts=-1 .* at least 0"),
    ({"n_routed_experts": 8.0}, r"n_routed_experts=8\.0 .* integer"),
    ({"moe_layer_freq": 0}, r"moe_layer_freq=0 .* at least 1"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads=3 .* divide num_attention_heads=4"),
    (
        {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1},
        r"n_group=3 .* divide n_routed_experts=8",
    ),
    ({"first_k_dense_replace": None}, r"first_k_dense_replace=None .* at least 0"),
    ({"hidden_act": "nope"}, r"hidden_act='nope' .* 'silu'"),
    ({"rms_norm_eps": float("inf")}, r"rms_norm_eps=inf .* finite"),
    ({"rope_parameters": "x"}, r"rope_parameters='x' .* dictionary"),
    ({"rope_scaling": {"type": "foo", "factor": 2.0}}, r"rope_type 'foo' must be one of .*'linear'"),
    ({"norm_topk_prob": "false"}, r"norm_topk_prob='false' .* true or false"),
    ({"tie_word_embeddings": "false"}, r"tie_word_embeddings='false' .* true or false"),
    ({"attention_dropout": 2.0}, r"attention_dropout=2\.0 .* below 1"),
    ({"pad_token_id": 96}, r"pad_token_id=96 .* vocab_size=96"),
    ({"aux_loss_alpha": float("inf")}, r"aux_loss_alpha=inf .* finite"),
    ({"aux_loss_alpha": -0.1}, r"aux_loss_alpha=-0\.1 .* at least 0"),
    ({"aux_loss_alpha": float("nan")}, r"aux_loss_alpha=nan .* at least 0"),
    ({"device_balance_alpha": -1.0, "n_device_groups": 2}, r"device_balance_alpha=-1\.0 .* at least 0"),
    ({"communication_balance_alpha": "x"}, r"communication_balance_alpha='x' .* at least 0"),
    ({"sequence_balance_alpha": -1e-4}, r"sequence_balance_alpha=-0\.0001 .* at least 0"),
    ({"router_z_loss_alpha": True}, r"router_z_loss_alpha=True .* at least 0"),
    ({"n_device_groups": 3}, r"n_device_groups=3 .* divide n_routed_experts=8"),
    ({"n_device_groups": 2.0}, r"n_device_groups=2\.0 .* integer"),
    ({"n_device_groups": 4, "max_devices_per_token": 5}, r"max_devices_per_token=5 .* n_device_groups=4"),
    ({"n_device_groups": 4, "max_devices_per_token": 0}, r"max_devices_per_token=0 .* at least 1"),
    (
        {"device_balance_alpha": 0.1, "n_device_groups": 1},
        r"device_balance_alpha=0\.1 .* n_device_groups",
    ),
    (
        {"communication_balance_alpha": 0.1, "n_device_groups": 1},
        r"communication_balance_alpha=0\.1 .* at least 2",
    ),
    ({"token_drop_capacity_factor": 1.0, "n_device_groups": 1}, r"token_drop_capacity_factor=1\.0 .* n_device_groups"),
    ({"token_drop_capacity_factor": 0, "n_device_groups": 2}, r"token_drop_capacity_factor=0 .* above 0"),
    ({"token_drop_capacity_factor": -1.0}, r"token_drop_capacity_factor=-1\.0 .* at least 0"),
    ({"token_drop_protected_share": 1.5}, r"token_drop_protected_share=1\.5 .* at most 1\.0"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_wrong_values(tiny_config: Callable[..., DeepseekMoeConfig], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (DeepseekConfig, {**MLA, "attention_type": "mla"}, "attention_type='mla'"),
        (DeepseekConfig, {"n_routed_experts": 8, "num_experts_per_tok": 2, "scoring_func": "sigmoid"}, "scoring_func"),
        (DeepseekConfig, {"head_dim": 64}, "head_dim=64"),
        (DeepseekConfig, {"hidden_size": 130, "num_attention_heads": 4, "head_dim": 32}, "head_dim=32"),
        (
            DeepseekV2Config,
            {"n_routed_experts": 8, "num_experts_per_tok": 2, "topk_method": "noaux_tc"},
            "topk_method",
        ),
        (DeepseekV3Config, {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ],
)
def test_a_dialect_refuses_what_its_official_code_cannot_compute(
    config_class: type, fields: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


def test_devices_are_the_groups_of_the_gate_unless_set(tiny_config: Callable[..., DeepseekMoeConfig]) -> None:
    limited = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    assert tiny_config().device_groups == (1, 1)
    assert tiny_config(n_device_groups=8).device_groups == (8, 3)
    assert tiny_config(**limited).device_groups == (4, 2)
    assert tiny_config(**limited, n_device_groups=2).device_groups == (2, 2)
    assert tiny_config(**limited, max_devices_per_token=3).device_groups == (4, 3)


@pytest.mark.parametrize("config_class", [DeepseekConfig, DeepseekV2Config, DeepseekV3Config])
def test_official_files_hold_our_fields_only_where_they_are_set(config_class: type) -> None:
    own = {"device_balance_alpha": 0.05, "communication_balance_alpha": 0.02, "sequence_balance_alpha": 1e-4,
           "router_z_loss_alpha": 1e-3, "n_device_groups": 2, "max_devices_per_token": 1,
           "token_drop_capacity_factor": 1.0, "token_drop_protected_share": 0.2}  # fmt: skip
    routed = {"n_routed_experts": 8, "num_experts_per_tok": 2}
    groups = {"n_group": 2, "topk_group": 1} if config_class is DeepseekV3Config else {}
    assert own.keys().isdisjoint(json.loads(config_class(**routed, **groups).to_json_string()))
    saved = json.loads(config_class(**routed, **groups, **own).to_json_string())
    assert own.items() <= saved.items()
    assert own.items() <= config_from_dict(saved).to_dict().items()


def test_bias_balancing_works_with_a_softmax_gate_too(tiny_model: Callable) -> None:
    gate = tiny_model(topk_method="noaux_tc").model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.shape == (8,)


def test_presets_are_valid_and_named() -> None:
    assert {"deepseekmoe-2b", "deepseek-moe-16b", "deepseekmoe-145b", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3",
            "moonlight-16b-a3b", "gshard-137b", "dense"} == set(list_presets())  # fmt: skip
    for name in list_presets():
        assert isinstance(load_preset(name), DeepseekMoeConfig)
    assert load_preset("dense").moe_layers == ()
    with pytest.raises(ValueError, match=r"preset='deepseek-v9' .* deepseek-v3"):
        load_preset("deepseek-v9")


def test_a_folder_is_read_whatever_is_registered(golden: Golden, tmp_path: Path) -> None:
    assert load_config(golden.folder).to_diff_dict() == AutoConfig.from_pretrained(golden.folder).to_diff_dict()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type='llama' .* deepseekmoe, deepseek, deepseek_v2, deepseek_v3"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type"')
    with pytest.raises(ValueError, match="not valid JSON"):
        load_config(tmp_path)


def test_overrides_at_load_time_are_checked_and_derived_from(golden: Golden) -> None:
    with pytest.raises(ValueError, match=r"num_experts_per_tok=20 .* n_routed_experts=8"):
        AutoConfig.from_pretrained(golden.folder, num_experts_per_tok=20)
    config = AutoConfig.from_pretrained(golden.folder, num_experts=16, router_aux_loss_coef=0.25)
    assert (config.n_routed_experts, config.router_aux_loss_coef) == (16, 0.25)
    alias = "sequence_balance_alpha" if golden.name.startswith("v3") else "aux_loss_alpha"
    assert getattr(config, alias) == 0.25
    config, unused = AutoConfig.from_pretrained(golden.folder, return_unused_kwargs=True, vocab_size=50, nonsense=1)
    assert config.vocab_size == 50 and unused == {"nonsense": 1}


def test_a_head_width_that_nothing_else_gives_survives_saving(tiny_config: Callable[..., DeepseekMoeConfig]) -> None:
    for fields in ({"hidden_size": 130, "head_dim": 32}, {"hidden_size": 32, "head_dim": 16}, {"hidden_size": 32}):
        config = tiny_config(**fields)
        assert config_from_dict(json.loads(config.to_json_string())).head_dim == config.head_dim


def test_wrong_content_of_a_config_file() -> None:
    with pytest.raises(ValueError, match="type list is not allowed"):
        config_from_dict([1, 2])  # type: ignore[arg-type]
