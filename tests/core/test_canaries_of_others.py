"""What the package relies on of PEFT, TRL, accelerate and the Hub's client without a documented interface."""

import importlib
import inspect
import re

import peft
import torch
from huggingface_hub import CommitOperationAdd
from peft import LoraConfig, get_peft_model
from private_names import native, parameters, relies_on
from torch import nn
from transformers import PreTrainedModel

from modeling_deepseekmoe.support import library_support, peft_support


# ---------------------------------------------------------------------------------------------------------------- peft
class Two(nn.Module):
    """A linear layer and a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.stack = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@relies_on("peft", "_register_custom_module", breaks="LoRA on experts would build the merged stack in every pass.")
def test_own_layers_and_a_pass_on_to_peft() -> None:
    seen = []

    def create(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: object) -> nn.Module | None:
        seen.append((type(target), adapter_name, kwargs.get("parameter_name"), kwargs.get("target_name")))
        return None

    config = LoraConfig(r=2, target_modules=["linear"], target_parameters=["stack"])
    peft_support.use_own_layers(config, create)
    model = get_peft_model(nn.Sequential(Two()), config)
    assert [entry[2] for entry in seen] == [None, "stack"] and seen[0][0] is nn.Linear and seen[0][1] == "default"
    inner = model.base_model.model[0]
    assert isinstance(inner, peft_support.ParamWrapper) and inner.parameter_name == "stack"
    assert isinstance(inner.get_base_layer().linear, peft.tuners.lora.Linear)


@relies_on("peft", "_svd_generalized_task_arithmetic_weighted_adapter",
           breaks="Adapters on experts could not be combined by svd.")  # fmt: skip
def test_combining_by_svd_asks_for_one_layer_after_the_other() -> None:
    assert parameters(peft_support.LoraModel._svd_generalized_task_arithmetic_weighted_adapter)[:8] == [
        "self", "combination_type", "adapters", "weights", "new_rank", "target", "target_lora_A", "target_lora_B",
    ]  # fmt: skip
    asked = []

    class Model(peft_support.CombiningLoraModel):
        def combine_by_svd(self, layer: nn.Module, *args: object) -> bool:
            asked.append((type(layer), *args))
            return True

    model = get_peft_model(nn.Sequential(Two()), LoraConfig(r=2, target_modules=["linear"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["linear"]))
    model.base_model.__class__ = Model
    model.add_weighted_adapter(["default", "other"], [1.0, 2.0], "both", combination_type="svd")
    assert asked == [(peft.tuners.lora.Linear, ["default", "other"], [1.0, 2.0], 3, "both")]


@relies_on("peft", "_hf_tp_plan", "_hf_device_mesh",
           breaks="Adapters would be spread twice under tensor parallelism.")  # fmt: skip
def test_how_a_layer_is_spread_is_noted_on_it() -> None:
    source = inspect.getsource(inspect.getmodule(peft_support.LoraModel))
    assert "_hf_tp_plan" in source and "_hf_device_mesh" in source
    layer = nn.Linear(2, 2)
    assert peft_support.parallel_style_of(layer) is None
    layer._hf_tp_plan = "colwise"
    peft_support.spread_ourselves(layer)
    assert peft_support.parallel_style_of(layer) is None


@relies_on("peft", breaks="Adapters of experts would start with the wrong rank.")
def test_patterns_of_a_config() -> None:
    assert peft_support.get_pattern_key(["c", "a.b"], "x.a.b") == "a.b"
    assert peft_support.get_pattern_key(["c"], "x.a.b") == "x.a.b"


@relies_on("peft", breaks="The balancing bias would move where no file holds it, and be lost.")
def test_what_is_of_an_adapter() -> None:
    base = native()
    assert not any(map(peft_support.is_of_adapter, base.modules()))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"]))
    assert peft_support.is_of_adapter(model) and peft_support.is_of_adapter(base.model.layers[1].self_attn.o_proj)
    assert not any(map(peft_support.is_of_adapter, model.unload().modules()))


@relies_on("peft", breaks="layers_to_transform and exclude_modules would be ignored on experts.")
def test_where_a_config_puts_adapters() -> None:
    config = LoraConfig(target_modules=["experts"], layers_to_transform=[2], exclude_modules=["2.other.experts"])
    names = ("model.layers.2.mlp.experts", "model.layers.1.mlp.experts", "model.layers.2.other.experts")
    assert [peft_support.adapts_module(config, name) for name in names] == [True, False, False]


# ------------------------------------------------------------------------------------------ accelerate, the Hub, TRL
@relies_on("trl", breaks="TRL would train transformers' own classes for paths of V2 and V3.")
def test_trl_loads_paths_through_one_function() -> None:
    from trl.trainer import dpo_trainer, grpo_trainer, sft_trainer

    module = importlib.import_module(library_support.TRL_MODULE)
    load = getattr(module, library_support.TRL_LOADER)
    assert parameters(load)[:2] == ["model_id", "architecture"]
    for user in (sft_trainer, dpo_trainer, grpo_trainer):
        assert getattr(user, library_support.TRL_LOADER) is load


@relies_on("transformers", breaks="Adapters would be refused as incomplete checkpoints.")
def test_tensors_of_an_adapter_are_loaded_with_their_names() -> None:
    from transformers.integrations import PeftAdapterMixin

    source = inspect.getsource(PeftAdapterMixin.load_adapter)
    assert re.search(r"_load_pretrained_model\([^)]*expected_keys=", source, re.DOTALL)
    assert "expected_keys" not in inspect.getsource(PreTrainedModel.from_pretrained)


@relies_on("accelerate", "_old_forward", files=("support.library_support",),
           breaks="route_native_gates would lose the hooks of models on several devices.")  # fmt: skip
def test_hooks_keep_what_they_call_under_another_name() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = nn.Linear(2, 2)
    add_hook_to_module(module, ModelHook())
    module._old_forward = lambda x: x + 1
    assert torch.equal(module(torch.ones(1)), torch.full((1,), 2.0))


@relies_on("huggingface_hub", "_should_ignore", files=("support.library_support",),
           breaks="A file that the repository ignores would be missing from a push without a word.")  # fmt: skip
def test_what_is_left_out_of_a_commit_is_known_before() -> None:
    assert CommitOperationAdd("file", b"content")._should_ignore is None
    assert "_should_ignore" in inspect.getsource(inspect.getmodule(CommitOperationAdd))
