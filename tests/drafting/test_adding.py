"""New layers of multi-token prediction for a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MLA
from mtp_cases import depth_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import (
    add_mtp,
)


@pytest.mark.parametrize("initialisation", ["last_layer", "random"])
@pytest.mark.parametrize("kind", ["mha", "mla", "dense", "tied"])
def test_new_layers_for_any_model(tiny_model: Callable, tmp_path: Path, kind: str, initialisation: str) -> None:
    fields = {"mha": {}, "mla": MLA, "dense": {"n_routed_experts": None}, "tied": {"tie_word_embeddings": True}}[kind]
    model = tiny_model(**fields).eval()
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        add_mtp(model, 2, initialisation)
        assert torch.equal(model(ids).logits, before)
        first, last = model.model.layers[3], model.model.layers[2]
        copied = torch.equal(first.self_attn.o_proj.weight, last.self_attn.o_proj.weight)
        assert copied == (initialisation == "last_layer")
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 0, 1]
        expected = depth_logits(model, ids)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, mtp=True).eval()
        for one, other in zip(depth_logits(loaded, ids), expected, strict=True):
            assert torch.equal(one, other)
    assert not any("shared_head.head" in name for name in load_file(tmp_path / "model.safetensors"))


def test_new_layers_of_a_frozen_model_are_trained(tiny_model: Callable) -> None:
    model = tiny_model().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    add_mtp(model, initialisation="last_layer")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.layers.3.")}
    ids = torch.randint(3, 90, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    checkpointing = [layer._gradient_checkpointing_func.keywords for layer in model.model.layers]
    assert checkpointing == [{"use_reentrant": True}] * 4


def test_last_layers_without_experts_cannot_be_copied(tiny_model: Callable) -> None:
    model = tiny_model(first_k_dense_replace=3)
    with pytest.raises(ValueError, match="no layer of this model has experts"):
        add_mtp(model, initialisation="last_layer")
    add_mtp(model)
    assert model.model.layers[3].mlp.experts is not None


def test_layers_are_split_and_wrapped_by_name(tiny_model: Callable) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    plain, ahead = tiny_model(), tiny_model()
    add_mtp(ahead)
    for model, wanted in ((plain, 1), (ahead, 2)):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=1, auto_wrap_policy="transformer_based_wrap")
        plugin.set_auto_wrap_policy(model)
        assert len(plugin.auto_wrap_policy.keywords["transformer_layer_cls"]) == wanted


def test_layers_that_the_checkpoint_has_are_mentioned(
    tiny_model: Callable, tmp_path: Path, warnings_of_package: list[str]
) -> None:
    model = tiny_model()
    add_mtp(model)
    model.save_pretrained(tmp_path)
    assert not warnings_of_package
    add_mtp(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (
        sum("To keep the layers of the checkpoint, load it with mtp=True" in one for one in warnings_of_package) == 1
    )
