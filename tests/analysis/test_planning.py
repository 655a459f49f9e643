"""Which configuration a training fits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from paths import SCRIPTS
from tolerances import PLANNED_COMMUNICATION
from typer.testing import CliRunner

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, plan_training
from modeling_deepseekmoe.analysis.planning import Layout, plan_memory
from modeling_deepseekmoe.cli.app import app

SCRIPT = SCRIPTS / "counted_communication.py"
PARAMETERS_16B = 16_375_728_128


def test_full_training_is_sixteen_bytes_a_parameter_divided_by_the_shards() -> None:
    plans = {plan.layout.configuration: plan for plan in plan_training("deepseek-moe-16b", gpus=8, gpu_memory="80GB")}
    assert list(plans) == [
        "ddp.yaml", "fsdp2_full.yaml", "fsdp2_full.yaml --ep-size 8", "fsdp2_cpu_offload.yaml"
    ]  # fmt: skip
    states = ("weights", "gradients", "optimizer")
    for name, shards in (("ddp.yaml", 1), ("fsdp2_full.yaml", 8), ("fsdp2_full.yaml --ep-size 8", 8)):
        plan = plans[name]
        assert plan.parameters == plan.trained == PARAMETERS_16B
        assert sum(plan.parts[part] for part in states) == 16 * PARAMETERS_16B // shards
        assert plan.fits == (plan.total <= 80e9) == (shards == 8)
    offloaded = plans["fsdp2_cpu_offload.yaml"]
    assert not any(offloaded.parts[part] for part in states) and offloaded.host == 16 * PARAMETERS_16B // 8
    # Of experts that stay where they are an eighth is put together, and sent nowhere.
    assert (
        plans["fsdp2_full.yaml --ep-size 8"].parts["gathered layers"]
        < plans["fsdp2_full.yaml"].parts["gathered layers"] / 2
    )
    assert sum(plans["fsdp2_full.yaml --ep-size 8"].sent.values()) < sum(plans["fsdp2_full.yaml"].sent.values()) / 4


def test_lora_and_esft_hold_a_frozen_base_in_bfloat16() -> None:
    lora = plan_training("deepseek-v2-lite", gpus=2, gpu_memory="80GB", method="lora", lora_rank=8)
    by_name = {plan.layout.configuration: plan for plan in lora}
    assert "fsdp2_cpu_offload.yaml" not in by_name
    whole, sharded = by_name["ddp.yaml"], by_name["fsdp2_lora.yaml"]
    assert whole.parts["weights"] == 2 * whole.parameters == 2 * sharded.parts["weights"]
    for plan in (whole, sharded):  # every rank holds all adapters: weight, gradient and two moments in float32
        assert plan.parts["trained beside them"] == 4 * plan.trained == plan.parts["gradients"]
        assert plan.parts["optimizer"] == 8 * plan.trained
        assert plan.sent["gradients"] == 4 * plan.trained  # an all-reduce of two ranks
    (esft,) = plan_training("deepseek-v2-lite", gpus=1, gpu_memory=80 * 10**9, method="esft", esft_share=0.25)
    assert esft.layout.configuration == "single_gpu.yaml" and not esft.sent
    assert esft.parts["trained beside them"] == 2 * esft.trained == esft.parts["gradients"]


# DeepSeekMoE 16B: 27 layers of 64 experts with three matrices of 2048 x 1408.
EXPERTS_16B = 27 * 64 * 3 * 2048 * 1408
# Bytes a weight: codes, scales, and of nf4 a float32 for 256 scales.
BYTES_A_WEIGHT = {"nf4": 0.5 + (1 + 4 / 256) / 64, "mxfp4": 0.5 + 1 / 32, "fp8": 1 + 4 / 128**2}


@pytest.mark.parametrize("kind", BYTES_A_WEIGHT)
def test_qlora_holds_quantised_experts(kind: str) -> None:
    """Figures by hand: everything but the experts is in bfloat16, and adapters are as those of LoRA."""
    settings = {"gpus": 1, "gpu_memory": "80GB", "lora_rank": 8, "tokens": 1024}
    (plan,) = plan_training("deepseek-moe-16b", method="qlora", format=kind, **settings)
    (lora,) = plan_training("deepseek-moe-16b", method="lora", **settings)
    assert plan.parts[f"experts in {kind}"] == round(EXPERTS_16B * BYTES_A_WEIGHT[kind])
    assert plan.parts["weights"] == 2 * (PARAMETERS_16B - EXPERTS_16B)
    # Of every expert A (r, 2048) and B (2816, r), and A (r, 1408) and B (2048, r). Of every layer's attention four
    # times A (r, 2048) and B (2048, r); of 27 shared FFNs of width 2816 and one dense FFN of 10944 three of each.
    sides = 27 * 64 * (2048 + 2816 + 1408 + 2048) + 28 * 4 * (2048 + 2048)
    sides += 27 * 3 * (2048 + 2816) + 3 * (2048 + 10944)
    assert plan.trained == lora.trained == 8 * sides
    assert plan.parts["trained beside them"] == plan.parts["gradients"] == 4 * 8 * sides
    assert plan.parts["optimizer"] == 8 * 8 * sides
    assert plan.parts["decoded experts"] == 2**28
    assert plan.parts["activations"] == lora.parts["activations"]
    parts = {name: size for name, size in plan.parts.items() if name != "CUDA (assumed)"}
    assert plan.parts["CUDA (assumed)"] == round(1.5e9 + 0.05 * sum(parts.values()))
    assert plan.total == sum(plan.parts.values()) and plan.fits and not plan.sent and not plan.host
    assert (plan.tokens, plan.lora_rank) == (1024, 8)


def test_the_correction_of_experts_is_counted() -> None:
    (plan,) = plan_training("deepseek-moe-16b", method="qlora", correction_rank=16, gpus=1, gpu_memory="80GB")
    experts = 27 * 64 * 16 * (2048 + 2 * 1408 + 1408 + 2048)
    assert plan.parts["correction of the experts"] == 2 * experts  # bfloat16
    with pytest.raises(ValueError, match="correction_rank=0 is not allowed"):
        plan_training("deepseek-moe-16b", method="qlora", correction_rank=0, gpus=1, gpu_memory="80GB")
    with pytest.raises(ValueError, match="correction_rank is not allowed with method='lora'"):
        plan_training("deepseek-moe-16b", method="lora", correction_rank=8, gpus=1, gpu_memory="80GB")


def test_qlora_on_a_cpu_and_over_several_ranks() -> None:
    config = DeepseekMoeConfig(**{**TINY, "hidden_size": 64, "moe_intermediate_size": 128})
    experts, held = 2 * 8 * 3 * 64 * 128, {"weights": "float32", "compute": "float32", "cuda": False}
    alone = plan_memory(config, Layout("x"), method="qlora", **held)
    assert alone.parts["experts in nf4"] == round(experts * BYTES_A_WEIGHT["nf4"])
    assert alone.parts["weights"] == 4 * (alone.parameters - experts)
    assert alone.parts["decoded experts"] == 2**22 and "CUDA (assumed)" not in alone.parts
    sharded = plan_memory(config, Layout("x", shards=2), method="qlora", **held)
    assert sharded.parts["experts in nf4"] == alone.parts["experts in nf4"] // 2
    assert sharded.parts["weights"] == alone.parts["weights"] // 2
    lora = plan_memory(config, Layout("x", shards=2), method="lora", **held)
    saved = experts * (4 - BYTES_A_WEIGHT["nf4"])  # experts are sent as they are stored, twice by half
    assert lora.sent["weights gathered"] - sharded.sent["weights gathered"] == pytest.approx(saved, abs=2)
    assert sharded.parts["gathered layers"] < lora.parts["gathered layers"]
    assert sharded.sent["gradients"] == lora.sent["gradients"] == 4 * sharded.trained
    # Autocast's copies are those of what is not quantised. Logits have a copy, a softmax and a gradient in float32.
    whole = plan_memory(config, Layout("x"), method="qlora", **held, checkpointing=False)
    halves = plan_memory(config, Layout("x"), method="qlora", **{**held, "compute": "bfloat16"}, checkpointing=False)
    copies = 2 * (alone.parameters - experts)
    assert 2 * halves.parts["activations"] == whole.parts["activations"] + 2 * copies + 4096 * 96 * (2 * 14 - 16)
    names = [plan.layout.configuration for plan in plan_training("deepseek-moe-16b", gpus=8, gpu_memory="80GB",
                                                                 method="qlora")]  # fmt: skip
    assert names == ["ddp.yaml", "fsdp2_lora.yaml"]


def test_what_does_not_fit_is_planned_smaller_if_that_is_allowed() -> None:
    settings = {"gpus": 1, "gpu_memory": "16GB", "method": "qlora"}
    (asked,) = plan_training("deepseek-moe-16b", **settings)
    assert not asked.fits and (asked.tokens, asked.lora_rank) == (4096, 16)
    (fewer,) = plan_training("deepseek-moe-16b", **{**settings, "gpu_memory": "22GB"}, shrink=["tokens", "lora_rank"])
    assert fewer.fits and (fewer.tokens, fewer.lora_rank) == (2048, 16)  # tokens first
    (smaller,) = plan_training("deepseek-moe-16b", **settings, shrink=["tokens", "lora_rank"])
    assert smaller.fits and (smaller.tokens, smaller.lora_rank) == (512, 8) and smaller.total <= 16e9
    (rank,) = plan_training("deepseek-moe-16b", **settings, tokens=256, shrink=["lora_rank"])
    assert rank.fits and (rank.tokens, rank.lora_rank) == (256, 8)
    (none,) = plan_training("deepseek-moe-16b", **settings, shrink=["tokens"])
    assert none == asked
    (full,) = plan_training("deepseek-moe-16b", gpus=1, gpu_memory="80GB", shrink=["tokens", "lora_rank"])
    assert not full.fits and (full.tokens, full.lora_rank) == (4096, None)
    with pytest.raises(ValueError, match=r"shrink=\['esft_share'\] is not allowed: names among lora_rank, tokens"):
        plan_training("deepseek-moe-16b", **settings, shrink=["esft_share"])


def test_several_machines() -> None:
    names = [plan.layout.configuration for plan in plan_training("deepseek-v2-lite", gpus=32, gpu_memory="80GB")]
    assert names == [
        "ddp.yaml",
        "hsdp.yaml (dp_replicate_size 4, dp_shard_size 8)",
        "fsdp2_full.yaml",
        "fsdp2_full.yaml --ep-size 8",
        "fsdp2_cpu_offload.yaml",
    ]
    hsdp = plan_training("deepseek-v2-lite", gpus=32, gpu_memory="80GB")[1].layout
    assert (hsdp.replicas, hsdp.shards) == (4, 8)


def test_activations_grow_with_tokens_and_without_checkpointing() -> None:
    config = DeepseekMoeConfig(**TINY)
    plans = [
        plan_memory(config, Layout("x"), tokens=tokens, checkpointing=checkpointing, cuda=False)
        for tokens, checkpointing in ((64, True), (128, True), (128, False))
    ]
    sizes = [plan.parts["activations"] for plan in plans]
    assert sizes[0] < sizes[1] < sizes[2] and "CUDA (assumed)" not in plans[0].parts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 0}, "gpus=0 is not allowed"),
        ({"gpus": 12}, "gpus=12 is not allowed: it must be a multiple of gpus_per_machine=8"),
        ({"gpu_memory": "much"}, "gpu_memory='much' is not allowed"),
        ({"gpu_memory": "0GB"}, "gpu_memory='0GB' is not allowed"),
        ({"gpu_memory": "80"}, "gpu_memory='80' is not allowed: it must be bytes, or a text as '80GB'"),
        ({"method": "dora"}, "method='dora' is not allowed: it must be one of full, lora, qlora, esft"),
        ({"tokens": 0}, "tokens=0 is not allowed"),
        ({"method": "lora", "lora_rank": 0}, "lora_rank=0 is not allowed"),
        ({"method": "esft", "esft_share": 0.0}, "esft_share=0.0 is not allowed"),
        ({"weights": "int8"}, "weights='int8' is not allowed"),
        ({"method": "qlora", "format": "int4"}, "format='int4' is not allowed: it must be one of nf4, fp8, mxfp4"),
    ],
)
def test_wrong_numbers(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_training("deepseekmoe-2b", **{"gpus": 8, "gpu_memory": "80GB", **settings})
    with pytest.raises(ValueError, match="method='lora' is not allowed with offloading"):
        plan_memory(DeepseekMoeConfig(**TINY), Layout("x", shards=2, offload=True), method="lora")
    with pytest.raises(ValueError, match="method='esft' is not allowed for a model without routed experts"):
        plan_training("dense", gpus=1, gpu_memory="80GB", method="esft")
    with pytest.raises(ValueError, match="method='qlora' is not allowed for a model without routed experts"):
        plan_training("dense", gpus=1, gpu_memory="80GB", method="qlora")
    with pytest.raises(ValueError, match=r"format='nf4' is not allowed for model\.layers\.1.*Choose 'fp8'"):
        plan_memory(DeepseekMoeConfig(**TINY), Layout("x"), method="qlora")
    with pytest.raises(ValueError, match="ep_size=2 is not allowed with method='qlora': it must be 1"):
        plan_memory(DeepseekMoeConfig(**TINY), Layout("x", shards=2, ep_size=2), method="qlora", format="fp8")
    with pytest.raises(ValueError, match="ep_size=3 is not allowed"):
        plan_memory(DeepseekMoeConfig(**TINY), Layout("x", shards=4, ep_size=3))


def test_on_the_command_line() -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["inspect", "deepseek-moe-16b", "--gpus", "8", "--gpu-memory", "80GB"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("configuration") and "weights" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [
        "ddp.yaml",
        "fsdp2_full.yaml",
        "fsdp2_full.yaml",
        "fsdp2_cpu_offload.yaml",
    ]
    assert "use this" in lines[2] and "use this" not in lines[3]
    result = runner.invoke(app, ["inspect", "deepseek-v2-lite", "--gpus", "1", "--method", "lora", "--json"])
    (plan,) = json.loads(result.output)
    assert plan["fits"] and plan["total"] == sum(plan["parts"].values())
    assert runner.invoke(app, ["inspect", "deepseek-v2-lite", "--gpus", "0"]).exit_code == 2
    result = runner.invoke(app, ["inspect", "deepseek-moe-16b", "--gpus", "1"])
    assert "Nothing fits" in result.output and "use this" not in result.output
    assert runner.invoke(app, ["inspect", "deepseek-v2-lite", "--gpus", "1", "--check"]).exit_code == 2


def test_quantised_experts_on_the_command_line() -> None:
    runner = CliRunner()
    command = ["inspect", "deepseek-moe-16b", "--method", "qlora", "--gpus", "1", "--gpu-memory", "16GB"]
    result = runner.invoke(app, command)
    header, row, note = result.output.splitlines()
    columns = dict(zip(re.split(r"  +", header), re.split(r"  +", row), strict=True))
    assert columns["fits"] == "use this" and columns["experts in nf4"] == "7.71 GB" and columns["weights"] == "2.85 GB"
    sizes = [float(cell.removesuffix(" GB")) for cell in list(columns.values())[2:] if cell != "-"]
    assert sizes[0] <= 16 and sizes[0] == pytest.approx(sum(sizes[1:]), abs=0.05)
    assert note == (
        "Nothing fits with --tokens 4096 and --lora-rank 16. This is planned with --tokens 512 and --lora-rank 8, "
        "found by halving."
    )
    result = runner.invoke(app, [*command, "--tokens", "1024", "--lora-rank", "16"])  # what is given stays
    assert "Nothing fits without the machine's memory" in result.output and "found by halving" not in result.output
    result = runner.invoke(app, [*command, "--format", "fp8", "--gpu-memory", "80GB", "--json"])
    (plan,) = json.loads(result.stdout)
    assert plan["fits"] and plan["parts"]["experts in fp8"] > 14.9e9 and plan["tokens"] == 4096
    assert runner.invoke(app, ["inspect", "deepseek-v2-lite", "--gpus", "1", "--format", "nf4"]).exit_code == 2
    result = runner.invoke(app, ["inspect", "deepseek-v2-lite", "--gpus", "1", "--method", "lora", "--format", "nf4"])
    assert result.exit_code == 2 and "--format: not allowed with --method lora" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sharding", "layout"),
    [
        ("full", {"fsdp_size": 2}, Layout("x", shards=2)),
        ("full", {"fsdp_size": 2, "ep_size": 2}, Layout("x", shards=2, ep_size=2)),
        ("lora", {"fsdp_size": 2}, Layout("x", shards=2)),
    ],
)
def test_communication_is_what_two_ranks_send(method: str, sharding: dict, layout: Layout, tmp_path: Path) -> None:
    config = DeepseekMoeConfig(**{**TINY, "first_k_dense_replace": 0, "num_hidden_layers": 4})
    DeepseekMoeForCausalLM(config).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += [str(tmp_path / "model"), str(tmp_path / "sent.pt"), json.dumps(sharding), method]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = torch.load(tmp_path / "sent.pt")
    settings = {"weights": "float32", "compute": "float32", "tokens": 32, "checkpointing": False, "lora_rank": 4}
    planned = plan_memory(config, layout, method=method, **settings).sent
    kinds = {"weights gathered": "all_gather", "gradients": "reduce_scatter" if method == "full" else "all_reduce",
             "tokens to experts": "all_to_all"}  # fmt: skip
    for kind, size in planned.items():
        assert size == pytest.approx(found[kinds[kind]], rel=PLANNED_COMMUNICATION), kind
