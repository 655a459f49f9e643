"""What is relied on in other libraries beyond their documented interfaces, name by name.

Fails first, and says what breaks, when a release of one of them has changed something. Each test is about the library
alone, and not about this package.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import CommitOperationAdd
from peft import LoraConfig, get_peft_model
from private_names import relies_on
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel, Trainer
from transformers.modeling_outputs import MoeModelOutputWithPast

from modeling_deepseekmoe import torch_support, transformers_support
from modeling_deepseekmoe.support import library_support, peft_support

MODEL = ("modeling_deepseekmoe",)
V3 = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
)  # fmt: skip


def native(**kwargs: object) -> PreTrainedModel:
    """transformers' own DeepSeek-V3, tiny."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**V3, **kwargs)).eval()


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


# ------------------------------------------------------------------------------- transformers: what a model declares
@relies_on(
    "transformers", "_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend",
    "_can_record_outputs", "_no_split_modules", "_skip_keys_device_placement",
    "_tied_weights_keys", "_keys_to_ignore_on_load_unexpected",
    files=MODEL, breaks="Attention would be eager only, device maps and tied heads wrong, outputs not recorded.",
)  # fmt: skip
def test_declarations_are_read_from_the_class() -> None:
    for name in ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend",
                 "_can_record_outputs", "_no_split_modules",
                 "_skip_keys_device_placement", "_tied_weights_keys",
                 "_keys_to_ignore_on_load_unexpected"):  # fmt: skip
        assert hasattr(PreTrainedModel, name), name
    readers = inspect.getsource(PreTrainedModel) + inspect.getsource(transformers.GenerationMixin)
    for name in ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn"):
        assert re.search(rf"(self|cls)\.{name}\b", readers), f"{name} is not read"
    model = native(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model._no_split_modules == {"DeepseekV3DecoderLayer"}
    assert isinstance(model._skip_keys_device_placement, set) and model._skip_keys_device_placement
    assert any("61" in pattern for pattern in model._keys_to_ignore_on_load_unexpected)


@relies_on("transformers", "_init_weights", files=MODEL, breaks="New models would have random memory for gates.")
def test_init_weights_is_called_for_every_module() -> None:
    seen = []

    class Model(PreTrainedModel):
        config_class = DeepseekV3Config

        def __init__(self, config: DeepseekV3Config) -> None:
            super().__init__(config)
            self.inner = nn.Linear(2, 2)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            seen.append(module)
            super()._init_weights(module)

    model = Model(DeepseekV3Config(**V3))
    assert model.inner in seen


@relies_on(
    "transformers", "_load_pretrained_model", files=MODEL,
    breaks="Checkpoints would be loaded without a check, and gates rounded.",
)  # fmt: skip
def test_load_pretrained_model_gets_the_files_and_a_config() -> None:
    loader = inspect.getattr_static(PreTrainedModel, "_load_pretrained_model")
    assert isinstance(loader, staticmethod)
    assert parameters(PreTrainedModel._load_pretrained_model)[:4] == [
        "model", "state_dict", "checkpoint_files", "load_config",
    ]  # fmt: skip
    from transformers.modeling_utils import LoadStateDictConfig

    assert {"hf_quantizer", "ignore_mismatched_sizes"} <= {field.name for field in fields(LoadStateDictConfig)}


@relies_on("transformers", "_can_set_experts_implementation", files=MODEL,
           breaks="set_experts_implementation would do nothing for the classifiers.")  # fmt: skip
def test_setting_an_experts_implementation_asks_the_class() -> None:
    assert inspect.ismethod(PreTrainedModel._can_set_experts_implementation)
    assert "_can_set_experts_implementation()" in inspect.getsource(PreTrainedModel.set_experts_implementation)
    assert parameters(PreTrainedModel.get_correct_experts_implementation) == ["self", "requested_experts"]


@relies_on("transformers", "_upload_modified_files", files=("remote_code",),
           breaks="save_pretrained(push_to_hub=True) would publish models without their code.")  # fmt: skip
def test_everything_that_is_uploaded_goes_through_one_method() -> None:
    for kind in (PreTrainedModel, transformers.PreTrainedConfig):
        assert parameters(kind._upload_modified_files)[:4] == ["self", "working_dir", "repo_id", "files_timestamps"]
        assert "self._upload_modified_files(" in inspect.getsource(kind.save_pretrained)


@relies_on("transformers", "_apply_gate", breaks="Experts could not be computed by products of groups.")
def test_the_gating_of_experts() -> None:
    experts = native().model.layers[1].mlp.experts
    rows = torch.randn(3, 16)
    gate, up = rows.chunk(2, dim=-1)
    assert torch.equal(experts._apply_gate(rows), experts.act_fn(gate) * up)
    assert transformers_support.gating_of(type(experts)) is transformers_support.plain_gating()
    own = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts
    assert transformers_support.gating_of(own) is not transformers_support.plain_gating()
    assert (experts.has_gate, experts.has_bias, experts.is_transposed) == (True, False, False)


@relies_on("transformers", "_experts_implementation", breaks="Adapters could be left out by another implementation.")
def test_a_config_knows_the_experts_implementation() -> None:
    model = native()
    model.set_experts_implementation("eager")
    assert transformers_support.experts_implementation_of(model.config) == "eager"


@relies_on("transformers", breaks="Language-model heads would not be divided under tensor parallelism and FSDP2.")
def test_plans_of_a_model_can_be_changed_in_place() -> None:
    model = native()
    for plan in (model.tp_plan, model.pp_plan, model.fsdp_plan):
        plan["lm_head"] = "something"
    assert model.tp_plan["lm_head"] == model.pp_plan["lm_head"] == model.fsdp_plan["lm_head"] == "something"
    assert native().tp_plan["lm_head"] != "something"


# ----------------------------------------------------------------------------------------------- transformers: Trainer
@relies_on(
    "transformers", "_save", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_load_from_checkpoint",
    "_load_best_model", files=("sharding.trainer",),
    breaks="ShardedTrainer's checkpoints would be written and read by Trainer, which cannot for sharded models.",
)  # fmt: skip
def test_trainer_saves_and_loads_by_these_methods() -> None:
    assert parameters(Trainer._save) == ["self", "output_dir", "state_dict"]
    assert parameters(Trainer._save_optimizer_and_scheduler) == ["self", "output_dir"]
    assert parameters(Trainer._load_optimizer_and_scheduler) == ["self", "checkpoint"]
    assert parameters(Trainer._load_from_checkpoint)[:2] == ["self", "resume_from_checkpoint"]
    assert parameters(Trainer._load_best_model) == ["self"]
    source = inspect.getsource(Trainer)
    for call in ("self._save(output_dir", "self._save_optimizer_and_scheduler(output_dir)",
                 "self._load_optimizer_and_scheduler(", "self._load_from_checkpoint(",
                 "self._load_best_model()"):  # fmt: skip
        assert call in source, call
    assert "self.save_model(output_dir, " in inspect.getsource(Trainer._save_checkpoint)


# ----------------------------------------------------------------------- transformers: names without an underscore
@pytest.mark.parametrize("name", sorted(transformers_support._MODULE_OF))
def test_undocumented_names_are_where_they_were(name: str) -> None:
    assert getattr(transformers_support, name) is not None


WANTED = {
    "create_causal_mask": ["config", "inputs_embeds", "attention_mask", "position_ids"],
    "DeepseekV3MLP": ["config", "intermediate_size"],
    "DeepseekV3Attention": ["config", "layer_idx"],
    "LlamaAttention": ["config", "layer_idx"],
    "LlamaRMSNorm": ["hidden_size", "eps"],
    "LlamaRotaryEmbedding": ["config"],
    "OutputRecorder": ["target_class", "index"],
    "WeightConverter": ["source_patterns", "target_patterns", "operations"],
    "MergeModulelist": ["dim"],
    "Concatenate": ["dim"],
    "register_checkpoint_conversion_mapping": ["mapping", "overwrite"],
    "revert_weight_conversion": ["model", "state_dict"],
    "custom_object_save": ["obj", "folder", "config"],
    "get_relative_import_files": ["module_file"],
    "maybe_autocast": ["device_type", "enabled"],
    "normal_": ["tensor", "mean", "std"],
    "zeros_": ["tensor"],
    "unwrap_model": ["model", "recursive"],
    "save_optimizer_distributed": ["model", "optimizer"],
    "load_optimizer_distributed": ["model", "optimizer"],
}


@pytest.mark.parametrize("name", WANTED)
def test_undocumented_names_take_what_they_are_given(name: str) -> None:
    found = parameters(getattr(transformers_support, name))
    assert set(WANTED[name]) <= set(found), f"{name}: {found}"


@relies_on("transformers", breaks="Layers would write to one cache while masks and outputs use another.")
def test_the_cache_has_one_name_everywhere() -> None:
    name = transformers_support.cache_name()
    for function in (
        transformers_support.create_causal_mask,
        transformers_support.LlamaAttention.forward,
        transformers_support.DeepseekV3Attention.forward,
        DeepseekV3ForCausalLM.forward,
        DeepseekV3ForCausalLM.prepare_inputs_for_generation,
    ):
        assert name in parameters(function), function.__qualname__
    outputs = native()(torch.tensor([[1, 2, 3]]), use_cache=True)
    assert getattr(outputs, name).get_seq_length() == 3 and name in outputs.keys()  # noqa: SIM118
    assert name in (*transformers_support.CACHE_NAMES,)
    assert issubclass(transformers.DynamicCache, transformers.Cache)
    if name != "cache":
        assert not issubclass(transformers_support.PagedAttentionCache, transformers.Cache)


@relies_on("transformers", breaks="Router logits and hidden states could not be asked for.")
def test_outputs_are_recorded_from_the_first_of_a_tuple() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x + 2

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Gate()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.gate(x)[1],)

    class Model(PreTrainedModel):
        config_class = DeepseekV3Config
        _can_record_outputs = {  # noqa: RUF012
            "router_logits": transformers_support.OutputRecorder(Gate, index=0), "hidden_states": Layer
        }  # fmt: skip

        def __init__(self, config: DeepseekV3Config) -> None:
            super().__init__(config)
            self.layer = Layer()
            self.post_init()

        @transformers_support.merge_with_config_defaults
        @transformers_support.capture_outputs
        def forward(self, x: torch.Tensor, use_cache: bool | None = None, **kwargs: object) -> MoeModelOutputWithPast:
            used.append(use_cache)
            return MoeModelOutputWithPast(last_hidden_state=self.layer(x)[0])

    used: list[bool | None] = []
    outputs = Model(DeepseekV3Config(**V3))(torch.zeros(1), output_router_logits=True, output_hidden_states=True)
    assert [logits.item() for logits in outputs.router_logits] == [1]
    assert [states.item() for states in outputs.hidden_states] == [0, 2] and used == [True]


@relies_on("transformers", breaks="The experts implementation 'deepseekmoe' could not be chosen.")
def test_experts_implementations_are_looked_up_in_a_table() -> None:
    table = transformers_support.ALL_EXPERTS_FUNCTIONS
    calls = []

    def implementation(experts: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(tensor.shape for tensor in inputs))
        return inputs[0]

    table.register("canary", implementation)
    model = native()
    model.set_experts_implementation("canary")
    model(torch.tensor([[1, 2, 3]]))
    assert calls == [((3, 16), (3, 2), (3, 2))] and "canary" in table


@relies_on("transformers", breaks="Experts could not be stacked while a checkpoint is read, nor saved one by one.")
def test_stacked_experts_are_saved_one_by_one() -> None:
    model = native()
    stack = "model.layers.1.mlp.experts.down_proj"
    parts = transformers_support.revert_weight_conversion(model, {stack: model.state_dict()[stack]})
    assert set(parts) == {f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(4)}


@relies_on("transformers", breaks="Tokenizers of V1 would lose their spaces; labels be shifted twice.")
def test_tables_of_the_auto_classes() -> None:
    assert isinstance(transformers_support.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS, set)
    by_type = "deepseek_v3" in transformers_support.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    looks_inside = "ByteLevel" in inspect.getsource(inspect.getmodule(transformers.AutoTokenizer))
    assert by_type is not looks_inside  # since 5.22
    assert transformers_support.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["deepseek_v3"] == "DeepseekV3ForCausalLM"
    assert transformers_support.TOKENIZER_MAPPING_NAMES["chatlm"] == "TokenizersBackend"
    transformers.AutoConfig.register("deepseek_v3", DeepseekV3Config, exist_ok=True)
    assert transformers.CONFIG_MAPPING["deepseek_v3"] is DeepseekV3Config


@relies_on("transformers", breaks="Trainer(push_to_hub=True) would upload models without their code.")
def test_callbacks_that_every_trainer_has() -> None:
    assert isinstance(getattr(transformers.trainer, transformers_support.TRAINER_CALLBACKS), list)
    assert transformers_support.PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert transformers_support.TRAINER_STATE_NAME == "trainer_state.json"
    assert transformers_support.SaveStrategy.NO == "no"
    assert "self.is_in_train = True" in inspect.getsource(Trainer)


@relies_on("transformers", breaks="Fields of a config would not be checked.")
def test_tables_of_activations_and_rotary_embeddings() -> None:
    assert {"silu", "gelu"} <= set(transformers_support.ACT2CLS)
    assert isinstance(transformers_support.ACT2FN["silu"], (nn.SiLU, transformers_support.SiLUActivation))
    assert {"yarn", "linear", "dynamic"} <= set(transformers_support.ROPE_INIT_FUNCTIONS)


@relies_on("transformers", breaks="Published repositories would lack files.")
def test_files_that_a_file_imports_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from .b import x\n\n\ndef f():\n    from .c import y\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "c.py").write_text("y = 1\n")
    found = transformers_support.get_relative_import_files(tmp_path / "a.py")
    assert {Path(file).name for file in found} == {"b.py", "c.py"}


# --------------------------------------------------------------------------------------------------------------- torch
@relies_on("torch", "_current_graph_task_id", breaks="Recomputed layers would be counted twice.")
def test_a_backward_pass_can_be_seen() -> None:
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_support.in_backward_pass())
        return x.sin()

    for reentrant in (True, False):
        seen.clear()
        checkpoint(layer, torch.ones(1, requires_grad=True), use_reentrant=reentrant).sum().backward()
        assert seen == [False, True]


@relies_on("torch", "_apply", breaks="The balancing bias would be rounded by model.to(torch.bfloat16).")
def test_casting_goes_through_apply() -> None:
    class Holder(torch_support.Float32Buffers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.tensor([0.1]))
            self.cast = nn.Parameter(torch.tensor([0.1]))

    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.cpu()):
        model = nn.Sequential(Holder())
        cast(model)
        assert model[0].kept.dtype == torch.float32 and model[0].kept == torch.tensor([0.1])
    assert model[0].cast.dtype == torch.float32
    assert nn.Sequential(Holder()).half()[0].cast.dtype == torch.float16


@relies_on("torch", "_set_pg_timeout", breaks="A rank that waits for another would do so for half an hour.")
def test_the_timeout_of_a_group_can_be_set(tmp_path: Path) -> None:
    assert parameters(dist.distributed_c10d._set_pg_timeout) == ["timeout", "group"]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch_support.set_group_timeout(dist.group.WORLD, 7)
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=7)
    finally:
        dist.destroy_process_group()


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


def test_a_missing_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformers_support._MODULE_OF, "gone", "transformers.utils")
    with pytest.raises(ImportError, match=r"has no transformers\.utils\.gone, which modeling-deepseekmoe needs"):
        _ = transformers_support.gone
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = transformers_support.unknown
