"""What is relied on in other libraries beyond their documented interfaces, name by name.

Fails first, and says what breaks, when a release of one of them has changed something. Each test is about the library
alone, and not about this package.
"""

import importlib
import inspect
import re
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from private_names import V3, native, parameters, relies_on
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel, Trainer
from transformers.modeling_outputs import MoeModelOutputWithPast

from modeling_deepseekmoe import experts_gating, torch_support, transformers_support

MODEL = ("modeling_pretrained",)


# ------------------------------------------------------------------------------- transformers: what a model declares
@relies_on(
    "transformers", "_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend",
    "_can_record_outputs", "_no_split_modules", "_skip_keys_device_placement",
    "_keys_to_ignore_on_load_unexpected",
    files=MODEL, breaks="Attention would be eager only, device maps wrong, outputs not recorded.",
)  # fmt: skip
@relies_on("transformers", "_tied_weights_keys", files=("modeling_deepseekmoe",), breaks="Heads would not be tied.")
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
    assert experts_gating.gating_numbers(experts) == experts_gating.SILU
    own = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts
    assert callable(transformers_support.gating_of(own))
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


@relies_on("transformers", "_get_dtype_plan", breaks="Gates that stay in float32 would be rounded by a quantiser.")
def test_a_model_says_which_parameters_stay_in_float32() -> None:
    assert native()._get_dtype_plan(torch.bfloat16)["e_score_correction_bias"] == torch.float32


@relies_on("transformers", breaks="Files that another quantiser has written could not be read as they are.")
def test_configs_of_quantisers_are_merged_in_one_place() -> None:
    merge = importlib.import_module(transformers_support.QUANTIZERS_MODULE)
    chooser = getattr(merge, transformers_support.QUANTIZERS_CLASS)
    method = getattr(chooser, transformers_support.QUANTIZERS_MERGE)
    assert parameters(method) == ["quantization_config", "quantization_config_from_args"]
    assert f"{transformers_support.QUANTIZERS_MERGE}(" in inspect.getsource(merge.get_hf_quantizer)
    assert "HF_DEACTIVATE_ASYNC_LOAD" in inspect.getsource(importlib.import_module("transformers.core_model_loading"))


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


@relies_on("torch", "_execution_engine", breaks="A second backward pass would add the balance losses again.")
def test_the_end_of_a_backward_pass_is_told() -> None:
    seen: list[str] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            torch_support.after_backward_pass(lambda: seen.append("end"))
            seen.append("inside")
            return gradient

    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda gradient: seen.append("leaf"))
    Watch.apply(checkpoint(torch.sin, leaf, use_reentrant=True)).sum().backward()
    assert seen == ["inside", "leaf", "end"]


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


def test_a_missing_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformers_support._MODULE_OF, "gone", "transformers.utils")
    with pytest.raises(ImportError, match=r"has no transformers\.utils\.gone, which modeling-deepseekmoe needs"):
        _ = transformers_support.gone
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = transformers_support.unknown
