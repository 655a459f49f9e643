"""Multi-token prediction: what its layers compute, and how they are loaded and saved."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Golden
from mtp_cases import depth_logits, golden_with_mtp, reference_logits
from safetensors.torch import load_file, save_file
from synthetic import PLAIN_CONFIG, dequantized, v3_tensors, write
from tolerances import assert_same
from training import Rows, arguments
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3ForCausalLM,
    Trainer,
)

import modeling_deepseekmoe
from modeling_deepseekmoe import add_mtp, register


@pytest.mark.parametrize("depths", [1, 2])
def test_logits_of_every_depth_against_the_equations(v3: Golden, tmp_path: Path, depths: int) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp", depths)
    ids = v3.expected["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, mtp=True).eval()
    register(override_native=False)
    native = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    expected = reference_logits(native, load_file(folder / "model.safetensors"), ids, depths)
    found = depth_logits(model, ids)
    assert len(found) == depths
    for depth in range(depths):
        assert_same(found[depth], expected[depth], f"depth {depth + 1}")


@pytest.mark.skipif(
    not hasattr(getattr(transformers.modeling_layers, "MtpModel", None), "forward_layer"),
    reason="the versions before run all depths at once, and draft",
)
@pytest.mark.parametrize("depths", [1, 2])
def test_logits_of_every_depth_against_transformers(v3: Golden, tmp_path: Path, depths: int) -> None:
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    folder = golden_with_mtp(v3, tmp_path / "mtp", depths)
    ids, first = v3.expected["input_ids"], v3.config["num_hidden_layers"]
    model = AutoModelForCausalLM.from_pretrained(folder, mtp=True).eval()
    found = depth_logits(model, ids)
    register(override_native=False)
    native = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    # It looks for the layers there, and by itself knows only layer 61.
    native._keys_to_ignore_on_load_unexpected = [rf"layers\.{first + depth}\." for depth in range(depths)]
    theirs = MtpModel.from_pretrained(native).eval()
    with torch.no_grad():
        hidden = native.model(ids).last_hidden_state
        for depth in range(depths):
            positions = torch.arange(depth + 1, ids.shape[1])[None].expand(len(ids), -1)
            cache = MtpCache(config=native.config.get_mtp_config())  # of each depth, which are as long as its input
            hidden = theirs.forward_layer(
                depth, hidden[:, : positions.shape[1]], positions, cache, input_ids=ids[:, depth + 1 :]
            )
            assert_same(found[depth], native.lm_head(hidden), f"depth {depth + 1}")


def test_without_mtp_nothing_changes(v3: Golden, tmp_path: Path, warnings_of_package: list[str]) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(model.model.layers) == v3.config["num_hidden_layers"] and not model.config.mtp
    assert sum("from_pretrained(..., mtp=True) loads them" in message for message in warnings_of_package) == 1
    ids = v3.expected["input_ids"]
    with torch.no_grad():
        with_mtp = AutoModelForCausalLM.from_pretrained(folder, mtp=True).eval()(ids).logits
        assert torch.equal(model(ids).logits, v3.model()(ids).logits) and torch.equal(with_mtp, model(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(v3.tensors)


@pytest.mark.parametrize("state_dict", [False, True], ids=["own", "given"])
def test_official_names_there_and_back(tmp_path: Path, state_dict: bool) -> None:
    tensors = {
        name: tensor.float() if "bias" in name else tensor.bfloat16()
        for name, tensor in dequantized(v3_tensors()).items()
    }
    write(tmp_path / "source", tensors, PLAIN_CONFIG, shards=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", mtp=True)
    model.save_pretrained(tmp_path / "saved", **({"state_dict": model.state_dict()} if state_dict else {}))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same = torch.equal(saved[name].view(torch.uint8), tensor.view(torch.uint8))  # NaN too
        assert saved[name].dtype == tensor.dtype and same, name
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and "mtp" not in config
    assert not any("shared_head.head" in name for name in model.state_dict())


def test_every_way_to_ask_for_the_layers(v3: Golden, tmp_path: Path) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp", copies=False)
    config = AutoConfig.from_pretrained(folder)
    cls = modeling_deepseekmoe.DeepseekV3ForCausalLM
    for model in (
        AutoModelForCausalLM.from_pretrained(folder, mtp=True),
        AutoModelForCausalLM.from_pretrained(folder, config=config, mtp=True),
        cls.from_pretrained(folder, mtp=True),
        cls.from_pretrained(folder, config=config, mtp=True),
        AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder, mtp=True)),
    ):
        assert len(model.model.layers) == v3.config["num_hidden_layers"] + 1 and model.config.mtp
    assert not config.mtp


def test_copies_that_differ_are_named(v3: Golden, tmp_path: Path, warnings_of_package: list[str]) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp")
    AutoModelForCausalLM.from_pretrained(folder, mtp=True)
    assert not any("differs" in message for message in warnings_of_package)
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{v3.config['num_hidden_layers']}.shared_head.head.weight"
    tensors[name][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(folder, mtp=True)
    assert [message for message in warnings_of_package if "differs" in message] == [
        f"{name} differs from lm_head.weight, which it should repeat. It is not loaded: the multi-token-prediction "
        "layers share the model's embedding and head."
    ]


@pytest.mark.parametrize("missing", ["eh_proj.weight", "mlp.experts.3.up_proj.weight", "self_attn.o_proj.weight"])
def test_missing_tensors_are_refused(v3: Golden, tmp_path: Path, missing: str) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.{v3.config['num_hidden_layers']}.{missing}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{missing} is missing".replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(folder, mtp=True)
    AutoModelForCausalLM.from_pretrained(folder)


def test_what_has_no_such_layers(v1: Golden, v3: Golden, tiny_model: Callable) -> None:
    with pytest.raises(ValueError, match="model_type 'deepseek' have no multi-token-prediction layers; convert"):
        AutoModelForCausalLM.from_pretrained(v1.folder, mtp=True)
    with pytest.raises(ValueError, match="'deepseek' is not allowed: its files have no place"):
        add_mtp(v1.model())
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers=0.*add_mtp"):
        AutoModelForCausalLM.from_pretrained(v3.folder, mtp=True, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"layers\.3\.\S+ is missing \(and \d+ more\)"):
        AutoModelForCausalLM.from_pretrained(v3.folder, mtp=True, num_nextn_predict_layers=1)
    with pytest.raises(ValueError, match="which predicts no tokens"):
        AutoModelForSequenceClassification.from_pretrained(v3.folder, mtp=True, num_nextn_predict_layers=1)
    model = tiny_model()
    for kwargs, message in (({"depth": 0}, "depth=0"), ({"initialisation": "zeros"}, "'zeros' is not allowed")):
        with pytest.raises(ValueError, match=message):
            add_mtp(model, **kwargs)
    add_mtp(model)
    with pytest.raises(ValueError, match="1 multi-token-prediction layers already"):
        add_mtp(model)


def test_trainer_resumes_with_the_layers(v3: Golden, tmp_path: Path) -> None:
    folder = golden_with_mtp(v3, tmp_path / "mtp")
    ids = torch.randint(3, 90, (12, 11))

    def run(name: str, **kwargs: object) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(folder, mtp=True)
        options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1} | kwargs
        trainer = Trainer(model, arguments(tmp_path / name, **options), train_dataset=Rows(input_ids=ids, labels=ids))
        trainer.train(resume_from_checkpoint=kwargs.get("resume_from_checkpoint"))
        logged = [log for log in trainer.state.log_history if "loss" in log]
        assert all(0 <= log["mtp/agreement_1"] <= 1 and log["mtp/loss_1"] > 0 for log in logged)
        return model

    whole = run("whole")
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert any("shared_head.head" in name for name in saved)
    resumed = AutoModelForCausalLM.from_pretrained(folder, mtp=True)
    trainer = Trainer(
        resumed,
        arguments(tmp_path / "whole", max_steps=4, save_steps=2, save_strategy="no"),
        train_dataset=Rows(input_ids=ids, labels=ids),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
