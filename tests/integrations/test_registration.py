"""Registration with the Auto classes."""

import json
import pickle
from pathlib import Path

import fresh_process
import pytest
import torch
import transformers
from conftest import GOLDEN_NAMES, Golden
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import modeling_deepseekmoe
from modeling_deepseekmoe import register


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_native_types_are_left_alone_by_default(name: str) -> None:
    register()
    native = name.startswith(("v2", "v3"))
    config = AutoConfig.from_pretrained(Golden(name).folder)
    assert type(config).__module__.startswith("transformers." if native else "modeling_deepseekmoe.")
    model = AutoModelForCausalLM.from_pretrained(Golden(name).folder)
    assert type(model).__module__.startswith("transformers." if native else "modeling_deepseekmoe.")
    register(override_native=True)
    model = AutoModelForCausalLM.from_pretrained(Golden(name).folder)
    assert type(model).__module__ == "modeling_deepseekmoe.modeling_deepseekmoe"
    assert type(model).__name__ == Golden(name).config["architectures"][0]
    register()
    assert type(AutoConfig.from_pretrained(Golden(name).folder)) is type(config)


@pytest.mark.parametrize("prefix", ["DeepseekMoe", "Deepseek", "DeepseekV2", "DeepseekV3"])
@pytest.mark.parametrize("override", [True, False])
def test_every_head_of_every_dialect(prefix: str, override: bool) -> None:
    register(override_native=override)
    config = getattr(modeling_deepseekmoe, f"{prefix}Config")(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        n_routed_experts=0, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    for auto, head in (
        ("AutoModel", "Model"),
        ("AutoModelForCausalLM", "ForCausalLM"),
        ("AutoModelForSequenceClassification", "ForSequenceClassification"),
        ("AutoModelForTokenClassification", "ForTokenClassification"),
    ):
        model = getattr(transformers, auto).from_config(config)
        assert type(model) is getattr(modeling_deepseekmoe, prefix + head)


def test_base_model_and_head_load_each_others_checkpoints(v3: Golden, tmp_path) -> None:

    base = AutoModel.from_pretrained(v3.folder)
    base.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name


def test_import_registers_and_imports_no_model_code() -> None:
    script = (
        "import sys, modeling_deepseekmoe\n"
        "slow = {'transformers.modeling_utils', 'transformers.activations', 'transformers.integrations.hub_kernels'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(Golden('v1-mha').folder)!r})\n"
        "assert type(model).__name__ == 'DeepseekForCausalLM'\n"
        "assert model.config.auto_map == {} and model._auto_class is None\n"
    )
    fresh_process.check("-c", script)


def test_import_and_load_without_optional_packages() -> None:
    script = (
        "import sys; sys.modules |= dict.fromkeys(('triton', 'peft', 'accelerate', 'matplotlib'))\n"
        "import torch, modeling_deepseekmoe\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(Golden('v1-mha').folder)!r})\n"
        "assert model(torch.arange(4)[None]).logits.isfinite().all()\n"
    )
    fresh_process.check("-c", script)


def test_an_unpickled_config_is_known_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(AutoConfig.from_pretrained(Golden("v1-mha").folder)))
    script = (
        "import pickle, modeling_deepseekmoe\n"
        "from transformers import AutoModelForCausalLM\n"
        f"config = pickle.load(open({str(tmp_path / 'config.pkl')!r}, 'rb'))\n"
        "assert type(AutoModelForCausalLM.from_config(config)).__name__ == 'DeepseekForCausalLM'\n"
    )
    fresh_process.check("-c", script)


@pytest.mark.parametrize("model_type", ["deepseek", "deepseekmoe"])
def test_byte_level_tokenizer_under_the_name_of_llamas(model_type: str, source: Path) -> None:
    """As the first generation was released; as Llama's own tokenizer it would lose its spaces."""
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"}))
    config = {**Golden("v1-mha").config, "model_type": model_type}
    (source / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = "hello world\n  def f(x):"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
