"""Upcycling: the MoE computes exactly what the dense model computed."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_models import COMMON, DENSE, dense_model, spoil_one_expert
from tolerances import UPCYCLED_LOGITS
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from modeling_deepseekmoe import DeepseekForCausalLM, DeepseekMoeForCausalLM
from modeling_deepseekmoe.conversion import (
    UpcyclingError,
    UpcyclingPlan,
    streaming,
    upcycle,
    upcycle_model,
    verify,
    verify_upcycling,
)

PLAN = UpcyclingPlan(shared_width=16, num_shards=4, num_copies=3)
text = torch.randint(256, (2, 25), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dialect", ["deepseekmoe", "deepseek"])
def test_equals_the_dense_model(name: str, dialect: str, tmp_path: Path) -> None:
    dense = dense_model(name)
    model = upcycle_model(dense, replace(PLAN, dialect=dialect))
    check = verify_upcycling(dense, model, text, tolerance=UPCYCLED_LOGITS)
    assert check.passed and check.new_tokens == 32, str(check)
    assert type(model) is {"deepseek": DeepseekForCausalLM, "deepseekmoe": DeepseekMoeForCausalLM}[dialect]
    config = model.config
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts) == (12, 4, 2)
    assert config.moe_intermediate_size == 8 and config.moe_layers == (0, 1, 2)
    assert config.tie_word_embeddings == (name == "llama-tied" and dialect == "deepseekmoe")

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(text).logits, model(text).logits)


@pytest.mark.parametrize(
    "plan",
    [
        UpcyclingPlan(shared_width=0, num_shards=1, num_copies=1),
        UpcyclingPlan(shared_width=0, num_shards=6, num_copies=2),
        UpcyclingPlan(shared_width=24, num_shards=2, num_copies=4),
        replace(PLAN, first_k_dense=2),
        replace(PLAN, num_copies=8, router_std=0.02, seed=5),
    ],
    ids=str,
)
def test_every_division(plan: UpcyclingPlan) -> None:
    dense = dense_model("llama")
    model = upcycle_model(dense, plan)
    assert verify_upcycling(dense, model, text).passed
    assert model.config.moe_layers == tuple(range(plan.first_k_dense, 3))


def test_tokens_use_different_copies_and_the_router_learns() -> None:
    model = upcycle_model(dense_model("llama"), PLAN).train()
    _, plan = model.model.layers[1].mlp.gate(torch.randn(200, 32))
    assert len(set((plan.expert_ids // 4)[:, 0].tolist())) == 3
    model(text, labels=text).loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().max() > 0


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = (upcycle_model(dense_model("llama"), PLAN).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_noise_separates_the_copies() -> None:
    dense, plan = dense_model("llama"), replace(PLAN, noise=0.1)
    exact, noisy = (upcycle_model(dense, plan, noise=noise) for noise in (False, True))
    before, after = (model.model.layers[0].mlp.experts.down_proj for model in (exact, noisy))
    assert torch.equal(before[0], before[4])
    assert (after[0] - after[4]).std().item() == pytest.approx(0.1 * before[0].std().item() * 2**0.5, rel=0.2)
    assert torch.equal(exact.model.layers[0].mlp.gate.weight, noisy.model.layers[0].mlp.gate.weight)


def test_the_dense_model_is_not_touched() -> None:
    dense = dense_model("llama-tied")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = upcycle_model(dense, replace(PLAN, dialect="deepseek"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_width": -1}, r"shared_width=-1 .* at least 0"),
        ({"num_shards": 0}, r"num_shards=0 .* at least 1"),
        ({"num_shards": 1}, r"num_shards=1 is not allowed with num_copies=3"),
        ({"num_copies": 0}, r"num_copies=0 .* at least 1"),
        ({"first_k_dense": -1}, r"first_k_dense=-1 .* at least 0"),
        ({"router_std": -1.0}, r"router_std=-1\.0 .* at least 0"),
        ({"noise": float("nan")}, r"noise=nan .* at least 0"),
        ({"noise": float("inf")}, r"noise=inf .* finite and at least 0"),
        ({"seed": -1}, r"seed=-1 is not allowed"),
        ({"seed": 2**62}, r"seed=\d+ is not allowed"),
        ({"dialect": "deepseek_v3"}, r"dialect='deepseek_v3' .* 'deepseekmoe' or 'deepseek'"),
        ({"first_k_dense": 3}, r"first_k_dense=3 .* below num_hidden_layers=3"),
        ({"num_shards": 5}, r"num_shards=5 .* divide the 32 neurons"),
        ({"shared_width": 48}, r"divide the 0 neurons"),
        ({"shared_width": 8, "num_shards": 2}, r"shared_width=8 .* multiple of the expert width 20"),
    ],
)
def test_wrong_plans(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle_model(
            dense_model("llama"), UpcyclingPlan(**{"shared_width": 16, "num_shards": 4, "num_copies": 3, **fields})
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(**COMMON, mlp_bias=True), "mlp_bias=True"),
        (MistralConfig(**COMMON, sliding_window=64), r"sliding_window=64 .* max_position_embeddings=128"),
    ],
)
def test_sources_that_cannot_be_kept_exactly(config: LlamaConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle_model(AutoModelForCausalLM.from_config(config), PLAN)


def test_qk_norm_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"'qwen3' is not allowed as a source: it normalises queries and keys \(QK-n"):
        upcycle_model(AutoModelForCausalLM.from_config(Qwen3Config(**COMMON, head_dim=8)), PLAN)


def test_a_model_that_came_from_a_gguf_file() -> None:
    """Its values are dequantised, and its config still says where they came from."""
    dense = dense_model("llama")
    dense.config.quantization_config = {"quant_method": "gguf"}
    assert verify_upcycling(dense, upcycle_model(dense, PLAN), text).passed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": "x"}, r"config\.json: .*num_hidden_layers"),
        ({"num_attention_heads": 0}, r"config\.json: "),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not allowed as a source"),
        ({"model_type": "qwen3"}, "QK-norm"),
        ({"intermediate_size": 80}, r"gate_proj\.weight .* has shape \(48, 32\)"),
    ],
)
def test_folders_that_cannot_be_upcycled(source: Path, tmp_path: Path, fields: dict, message: str) -> None:
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        upcycle(source, tmp_path / "moe", PLAN)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_other_architectures_are_refused(tiny_model: Callable) -> None:
    with pytest.raises(ValueError, match=r"model_type='deepseekmoe' .* llama, mistral, qwen2"):
        upcycle_model(tiny_model(), PLAN)


def test_rope_that_the_first_generation_lacks_is_refused() -> None:
    config = LlamaConfig(**COMMON, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})
    dense = AutoModelForCausalLM.from_config(config).eval()
    assert verify_upcycling(dense, upcycle_model(dense, PLAN), text).passed
    with pytest.raises(ValueError, match=r"rope_type='yarn' .* dialect 'deepseek'"):
        upcycle_model(dense, replace(PLAN, dialect="deepseek"))


def test_a_folder_becomes_a_folder(source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    check = upcycle(source, tmp_path / "moe", PLAN, report=lines.append)
    assert check.passed and any("Compared with the dense model" in line for line in lines)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.dtype == torch.bfloat16  # the source's
    assert (tmp_path / "moe" / "tokenizer.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "moe"}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dialect", ["deepseekmoe", "deepseek"])
def test_what_is_written_equals_the_dense_model(
    name: str, dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through files, and in blocks so small that every matrix takes several."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 512)
    dense = dense_model(name)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    sizes: list[int] = []
    plan = replace(PLAN, dialect=dialect)
    check = upcycle(tmp_path / "dense", tmp_path / "moe", plan, check_tokens=3, progress=sizes.append)
    assert check.passed and check.new_tokens == 3
    assert sum(sizes) == (tmp_path / "moe" / "model.safetensors").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert verify_upcycling(dense, model, text, tolerance=UPCYCLED_LOGITS).passed
    in_memory = upcycle_model(dense, plan).state_dict()
    assert all(torch.equal(in_memory[key], tensor) for key, tensor in model.state_dict().items())
    assert verify(tmp_path / "moe").tensors > 100


def test_noise_in_files_is_that_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, plan = dense_model("llama"), replace(PLAN, noise=0.1)
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", plan, check_tokens=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    expected = upcycle_model(dense, plan, noise=True).state_dict()
    assert all(torch.equal(expected[key], tensor) for key, tensor in model.state_dict().items())


def test_the_dtype_that_is_stored_is_the_one_that_is_verified(source: Path, tmp_path: Path) -> None:
    """Dialect `deepseek` multiplies the down projections by G: exact in bfloat16 for a power of two only."""
    six = UpcyclingPlan(shared_width=0, num_shards=6, num_copies=2, dialect="deepseek")
    with pytest.raises(UpcyclingError, match=r"num_shards=6 .* power of two"):
        upcycle(source, tmp_path / "six", six)
    assert upcycle(source, tmp_path / "six", six, dtype="float32").passed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "six").dtype == torch.float32
    assert upcycle(source, tmp_path / "four", replace(PLAN, dialect="deepseek")).passed
    with pytest.raises(ValueError, match=r"dtype='int8' .* keep, float32"):
        upcycle(source, tmp_path / "other", six, dtype="int8")


def test_noise_is_applied_after_the_check(source: Path, tmp_path: Path) -> None:
    noisy = replace(PLAN, noise=0.5)
    assert upcycle(source, tmp_path / "moe", noisy).passed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert not verify_upcycling(dense_model("llama"), model, text).passed


def test_a_used_destination_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    for destination in (tmp_path / "used", tmp_path / "used" / "file"):
        with pytest.raises(ValueError, match="must not exist, or be an empty folder"):
            upcycle(source, destination, PLAN)
    (tmp_path / "empty").mkdir()
    assert upcycle(source, tmp_path / "empty", PLAN).passed


def test_nothing_is_written_if_the_models_differ(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_one_expert(monkeypatch)
    with pytest.raises(UpcyclingError, match=r"differs from the dense model: max \|logit difference\|"):
        upcycle(source, tmp_path / "moe", PLAN)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_an_interrupted_run_is_resumed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"max_shard_size": "20KB"}
    assert upcycle(source, tmp_path / "whole", PLAN, **sizes).passed
    with monkeypatch.context() as context:
        finished: list[Path] = []

        def fail_at_the_fifth(self: Path, path: Path) -> Path:
            if len(finished) == 4:
                raise OSError(28, "No space left on device", str(path))
            finished.append(path)
            os.replace(self, path)
            return path

        context.setattr(Path, "replace", fail_at_the_fifth)
        with pytest.raises(OSError, match=r"No space left .* go on with --resume"):
            upcycle(source, tmp_path / "moe", PLAN, **sizes)
    assert not (tmp_path / "moe").exists()
    with pytest.raises(ValueError, match="unfinished work of an interrupted run"):
        upcycle(source, tmp_path / "moe", PLAN, **sizes)
    with pytest.raises(ValueError, match="cannot be resumed: it holds the work of another source"):
        upcycle(source, tmp_path / "moe", replace(PLAN, seed=1), resume=True, **sizes)
    lines: list[str] = []
    assert upcycle(source, tmp_path / "moe", PLAN, resume=True, report=lines.append, **sizes).passed
    assert sum("finished earlier" in line for line in lines) == 3  # and the mark
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "whole", "moe"}
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "moe" / path.name).read_bytes() == path.read_bytes()
