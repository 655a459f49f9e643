"""Files and checkpoints of sharded models, in one process: whole, and as one rank of a group."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import V3_LIKE
from peft import get_peft_model
from tolerances import assert_same
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import Rows, arguments, losses, reference_text
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_deepseekmoe import (
    LoadBalancingCallback,
    ShardedTrainer,
    expert_lora_config,
    last_complete_checkpoint,
    load_esft,
    save_sharded,
)
from modeling_deepseekmoe.conversion import verify
from modeling_deepseekmoe.lora.parallel import linear_with_factors
from modeling_deepseekmoe.sharding.trainer import set_timeout
from modeling_deepseekmoe.support.expert_parts import LocalPart, scale_gradient
from modeling_deepseekmoe.support.models import is_sharded, whole_tensor

Make = Callable[..., nn.Module]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One rank, alone in its groups."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tp"))
    dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("tied", [False, True])
def test_files_are_those_of_save_pretrained(tiny_model: Make, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(**V3_LIKE, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "gathered")
    size = save_sharded(model, tmp_path / "sharded", max_shard_size="50KB")
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size and set(index["weight_map"].values()) == set(files)
    assert any(".experts.7.down_proj.weight" in name for name in index["weight_map"])
    result = verify(tmp_path / "sharded", tmp_path / "gathered")
    assert set(result.compared) == {"identical"}
    # The same folder again: nothing of the old files stays, and nothing that an interrupted run has left.
    (tmp_path / "sharded" / "model-00009-of-00099.safetensors.unfinished").write_text("half")
    save_sharded(model, tmp_path / "sharded")
    assert [path.name for path in sorted((tmp_path / "sharded").iterdir())] == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    assert verify(tmp_path / "sharded", tmp_path / "gathered").compared == result.compared


def test_files_of_a_sharded_model(tiny_model: Make, mesh: DeviceMesh, tmp_path: Path) -> None:
    model = tiny_model(**V3_LIKE)
    model.save_pretrained(tmp_path / "before")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    assert is_sharded(model) and whole_tensor(model.lm_head.weight).shape == (96, 32)
    save_sharded(model, tmp_path / "after", max_shard_size=50_000)
    result = verify(tmp_path / "after", tmp_path / "before")
    assert set(result.compared) == {"identical"}
    set_timeout(model, 60)
    with pytest.raises(ValueError, match=r"is not allowed as a trained copy .* it is sharded"):
        expert_lora_config(model, train_router=True)
    with pytest.raises(ValueError, match="load_esft is not allowed for a sharded model"):
        load_esft(model, tmp_path)
    model.lm_head.weight.ds_id = 1
    with pytest.raises(ValueError, match="ZeRO-3 is not allowed"):
        save_sharded(model, tmp_path / "none")
    del model.lm_head.weight.ds_id
    adapted = get_peft_model(model, expert_lora_config(model, target_modules=("self_attn",)))
    with pytest.raises(ValueError, match="Merging is not allowed into sharded weights"):
        adapted.merge_adapter()
    with pytest.raises(ValueError, match="has adapters of PEFT, which is not allowed: save_pretrained saves them"):
        save_sharded(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="save_sharded takes a PreTrainedModel"):
        save_sharded(nn.Linear(2, 2), tmp_path / "none")


# ------------------------------------------------------------------------------------------------------------ adapters
def test_part_of_an_adapter_and_its_gradient(tiny_model: Make, mesh: DeviceMesh) -> None:
    factor_a, factor_b = torch.randn(8, 4, 32, requires_grad=True), torch.randn(32, 4, 8, requires_grad=True)
    part = LocalPart(slice(2, 4), slice(0, 16), 2)
    own_a, own_b = part.of_factors("gate_up_proj", factor_a, factor_b)
    assert torch.equal(own_a, factor_a[2:4]) and torch.equal(own_b, factor_b[..., 2:4])
    (own_a.sum() + own_b.sum()).backward()
    assert factor_a.grad[2:4].unique() == 2 and factor_a.grad[:2].unique() == factor_b.grad[..., 4:].unique() == 0
    part = LocalPart(slice(0, 8), slice(8, 16), 1)
    _, gate_up = part.of_factors("gate_up_proj", factor_a, factor_b)
    assert torch.equal(gate_up, torch.cat([factor_b[8:16], factor_b[24:]]))
    down, _ = part.of_factors("down_proj", factor_a, factor_b)
    assert torch.equal(down, factor_a[..., 8:16]) and scale_gradient(down, 1) is down
    experts = tiny_model().model.layers[1].mlp.experts
    assert LocalPart.of(experts) is None
    placed = distribute_tensor(experts.gate_up_proj.detach(), mesh["tp"], [Replicate()])
    experts.gate_up_proj = nn.Parameter(placed)
    experts.config.distributed_config = type("Sizes", (), {"tp_size": 3})
    assert LocalPart.of(experts) == LocalPart(slice(0, 8), slice(0, 16), 3)


@pytest.mark.parametrize("placement", [None, Replicate(), Shard(0), Shard(1)])
def test_adapter_beside_a_linear_weight(mesh: DeviceMesh, placement: Replicate | Shard | None) -> None:
    weight, rows = torch.randn(6, 5), torch.randn(7, 5, requires_grad=True)
    factors = torch.randn(3, 5, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    wanted = rows @ factors[0].t() @ factors[1].t()
    placed = weight if placement is None else distribute_tensor(weight, mesh["tp"], [placement])
    found = linear_with_factors(placed, rows, *factors)
    assert_same(found, wanted)
    gradients = [torch.autograd.grad(output.square().sum(), (rows, *factors)) for output in (found, wanted)]
    for mine, plain in zip(*gradients, strict=True):
        assert_same(mine, plain)


# ------------------------------------------------------------------------------------------------------------ training
def trained(model: nn.Module, folder: Path, trainer: type[Trainer] = ShardedTrainer, resume: bool = False) -> Trainer:
    rows = reference_text(32, 16)
    settings = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    biased = [LoadBalancingCallback()] if not hasattr(model, "peft_config") else []
    found = trainer(model, settings, train_dataset=Rows(input_ids=rows, labels=rows), callbacks=biased)
    found.train(resume_from_checkpoint=resume)
    return found


def interrupt(folder: Path) -> None:
    """As a process leaves it that is killed while it saves the last checkpoint."""
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_')


def test_one_process_resumes_the_last_complete_checkpoint(tiny_model: Make, tmp_path: Path) -> None:
    wanted = losses(trained(tiny_model(**V3_LIKE), tmp_path))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "optimizer" / ".metadata").is_file()
    assert not (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    interrupt(tmp_path)
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").train()
    assert losses(trained(model, tmp_path, resume=True)) == wanted
    assert last_complete_checkpoint(tmp_path / "checkpoint-x") is None


def test_adapters_resume(tiny_model: Make, tmp_path: Path) -> None:
    def adapted() -> nn.Module:
        model = tiny_model()
        torch.manual_seed(1)
        return get_peft_model(model, expert_lora_config(model, r=4, target_modules=("shared_experts",)))

    wanted = losses(trained(adapted(), tmp_path))
    interrupt(tmp_path)
    assert losses(trained(adapted(), tmp_path, resume=True)) == wanted


def test_checkpoints_of_plain_trainer_resume(tiny_model: Make, tmp_path: Path) -> None:
    wanted = losses(trained(tiny_model(**V3_LIKE), tmp_path, Trainer))
    interrupt(tmp_path)
    assert losses(trained(tiny_model(**V3_LIKE), tmp_path, resume=True)) == wanted


def test_a_checkpoint_that_is_overwritten_is_incomplete_meanwhile(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tiny_model(**V3_LIKE), tmp_path)

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("modeling_deepseekmoe.sharding.trainer.save_optimizer_distributed", fail)
    with pytest.raises(OSError, match="no space left"):
        trained(tiny_model(**V3_LIKE), tmp_path)  # the first step of which a checkpoint is there
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_nothing_to_resume_from(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"resume_from_checkpoint=True: {tmp_path} has no complete checkpoint"):
        trained(tiny_model(**V3_LIKE), tmp_path, resume=True)


def test_processes_that_do_not_find_each_other(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"world_size=1 is not allowed where 2 processes .*use_cpu=True"):
        ShardedTrainer(tiny_model(), settings)


def test_balancing_needs_devices_when_training_begins(tiny_model: Make) -> None:
    rows = torch.arange(12).view(1, 12)
    model = tiny_model(device_balance_alpha=0.1)
    with pytest.raises(ValueError, match=r"device_balance_alpha=0\.1 is not allowed: .* or expert parallelism"):
        model(rows, labels=rows)
    model.eval()(rows)
    model.config.distributed_config = type("Sizes", (), {"ep_size": 4})
    assert model.config.device_groups == (4, 3)
    assert model.train()(rows, labels=rows).aux_loss > 0
