"""The added balance losses where several processes or devices train: the mean over the ranks of what each would find
alone. What is right is computed from the gates' outputs, without the hooks of `add_auxiliary_loss`."""

from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from family_models import MODELS, tiny_model
from paths import SCRIPTS
from rank_batches import COEFFICIENTS, batch_of, train
from tolerances import assert_same
from torch import nn
from torch.utils import backend_registration

from modeling_deepseekmoe import add_auxiliary_loss
from modeling_deepseekmoe.balancing.loss_coefficients import LossCoefficients
from modeling_deepseekmoe.families.gate_rules import rule_of
from modeling_deepseekmoe.families.moe_layers import find_moe_layers

SCRIPT = SCRIPTS / "losses_of_ranks.py"
CASES = (
    "ddp:qwen3_moe", "ddp:glm4_moe:unused", "ddp:glm4_moe:checkpointing", "fsdp2:glm4_moe",
    "fsdp2:glm4_moe:late", "fsdp2:glm4_moe:checkpointing", "fsdp2:glm4_moe:wrapper", "fsdp2:glm4_moe:casts",
)  # fmt: skip
if (MODELS / "inkling2").exists():  # its outputs have no field for a balance loss
    CASES += ("ddp:inkling2:unused",)
if torch.__version__ >= "2.13":  # before, FSDP2 did not cast what a layer that is computed again is given
    CASES += ("fsdp2:glm4_moe:casts:checkpointing", "fsdp2:glm4_moe:casts:wrapper")


def alone(name: str, rank: int) -> dict[str, Any]:
    """What one rank finds without the others, by plain autograd."""
    model = tiny_model(name).train()
    model.set_experts_implementation("eager")
    layers, batch = find_moe_layers(model), batch_of(rank)
    shape, mask = batch["input_ids"].shape, batch["attention_mask"]
    seen: list[tuple[torch.Tensor, ...]] = []
    for layer in layers:
        layer.gate.register_forward_hook(lambda _, __, output: seen.append(output))
    task = model(**batch, use_cache=False).loss
    coefficients = LossCoefficients(**COEFFICIENTS, num_devices=2)
    losses = sum(
        coefficients.losses(rule_of(layer), logits.view(*shape, -1), ids.view(*shape, -1), mask).sum()
        for layer, (logits, _, ids) in zip(layers, seen, strict=True)
    )
    (task + losses).backward()
    real = mask.flatten().bool()
    counts = torch.stack([ids[real].flatten().bincount(minlength=8) for _, _, ids in seen])
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": (task + losses).item(), "aux": losses.item(), "gradients": gradients, "counts": counts,
            "tokens": int(mask.sum())}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two processes find, all cases in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    fresh_process.check(SCRIPT, folder / "found.pt", *CASES, "trainer", ranks=2, cwd=folder)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_have_the_mean_of_their_gradients(case: str, found: dict[str, dict[str, Any]]) -> None:
    ranks, case_found = [alone(case.split(":")[1], rank) for rank in range(2)], found[case]
    for (loss, aux), rank in zip(case_found["losses"], ranks, strict=True):
        assert abs(loss - rank["loss"]) < 1e-5 * rank["loss"] and abs(aux - rank["aux"]) < 1e-5 * rank["aux"]
    assert abs(ranks[0]["aux"] - ranks[1]["aux"]) > 1e-2
    assert set(case_found["gradients"]) == set(ranks[0]["gradients"])
    for name, gradient in case_found["gradients"].items():
        expected = (ranks[0]["gradients"][name] + ranks[1]["gradients"][name]) / 2
        assert gradient.any(), name
        torch.testing.assert_close(gradient, expected, atol=2e-5 * float(expected.abs().max()), rtol=1e-3, msg=name)
    assert torch.equal(case_found["counts"], ranks[0]["counts"] + ranks[1]["counts"])
    assert case_found["tokens"] == ranks[0]["tokens"] + ranks[1]["tokens"]
    assert_same(case_found["logged"], torch.tensor(ranks[0]["aux"] + ranks[1]["aux"]))


def test_trainer_in_two_processes(found: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Accumulated micro-batches of two ranks are those of one: each counts by its tokens."""
    two, one = found["trainer"], train(tmp_path, 2, 4)
    begin = dict(tiny_model("glm4_moe").named_parameters())
    for name, parameter in one["parameters"].items():
        change = float((parameter - begin[name]).detach().abs().max())
        torch.testing.assert_close(two["parameters"][name], parameter, atol=1e-3 * change, rtol=0, msg=name)
    gate = "model.layers.1.mlp.gate.weight"
    assert (one["parameters"][gate] - begin[gate]).abs().max() > 1e-3
    for key in ("loss", "aux_loss", "aux_loss/expert", "router/max_violation_batch"):
        assert [round(log[key], 4) for log in two["logs"]] == [round(log[key], 4) for log in one["logs"]], key


def test_layers_on_two_devices() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no backends in Python")
    said = fresh_process.check(SCRIPTS / "losses_on_devices.py", "glm4_moe").stdout.split()
    assert set(said) == {"cpu", "other", "other:0"} and said.count("cpu") >= 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_that_is_given_a_moved_tensor(reentrant: bool) -> None:
    """accelerate moves what a layer on another device is given: then it is another tensor. Here it is a copy."""

    class Moves(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(arg.clone() for arg in args), kwargs

    model, expected = tiny_model("glm4_moe").train(), alone("glm4_moe", 0)
    model.set_experts_implementation("eager")
    add_auxiliary_loss(model, **COEFFICIENTS, num_devices=2)
    for layer in model.model.layers:
        add_hook_to_module(layer, Moves())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch_of(0), use_cache=False).loss.backward()
    for key, parameter in model.named_parameters():
        assert_same(parameter.grad, expected["gradients"][key], key)
