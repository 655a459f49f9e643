"""Measure the memory of loading and training a model of a billion parameters, alone and sharded, and compare the plan.

A random `deepseekmoe` model in float32 (12 layers of 1024, 32 routed experts of width 704, two shared ones) is written
once. `ShardedTrainer` then loads it and trains it for two steps of AdamW: in one process, and in two gloo processes
that FSDP2 shards it over while it is loaded. It trains all parameters, or LoRA on attention, shared and routed
experts, or in one process the same LoRA on routed experts in nf4.

Every rank samples its own anonymous resident memory (`RssAnon`), less that of the imported libraries. glibc is told to
give back what is free. Frozen weights that still lie in mapped files are added to the memory of training. Beside it
stands the peak of all resident memory (`VmHWM`), which includes every page of the files that was read.

    python benchmarks/sharded_training.py [--folder FOLDER]

Prints a table and whether the limits are kept. Writes benchmarks/results/sharded_training.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainingArguments

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, ShardedTrainer, expert_lora_config
from modeling_deepseekmoe.analysis.counted_model import CountedModel
from modeling_deepseekmoe.analysis.planning import Layout, plan_memory

RESULTS = Path(__file__).parent / "results" / "sharded_training.json"
CONFIG = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "moe_intermediate_size": 704,
    "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 32,
    "n_shared_experts": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 0, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS, STEPS, RANK = (2, 128), 2, 8
CASES = [*((method, ranks) for method in ("full", "lora") for ranks in (1, 2)), ("qlora", 1)]
MOST_OF_ONE_PROCESS, MOST_OFF, MOST_OFF_QUANTISED = 0.60, 0.15, 0.10


class Memory(threading.Thread):
    """Samples this process's anonymous resident memory, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.base = self.now()
        self.start()

    @staticmethod
    def read(field: str) -> int:
        """Read a field of the operating system's status of this process, in bytes."""
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    @classmethod
    def now(cls) -> int:
        """Read the anonymous resident memory, in bytes."""
        return cls.read("RssAnon")

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def peak_since(self) -> int:
        """Return the peak since the last call, above the libraries' memory."""
        peak, self.peak = max(self.peak, self.now()) - self.base, self.now()
        return peak


def mapped_weights(model: torch.nn.Module) -> int:
    """Count the bytes of frozen weights that still lie in mapped files, and so not in anonymous memory."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    size = 0
    for parameter in model.parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        in_file = any(int(first, 16) <= own.data_ptr() < int(last, 16) for first, last in ranges)
        size += own.numel() * own.itemsize if in_file and not parameter.requires_grad else 0
    return size


class Blocks(torch.utils.data.Dataset):
    """Random tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, CONFIG["vocab_size"], (TOKENS[1],), generator=torch.Generator().manual_seed(idx))
        return {"input_ids": tokens, "labels": tokens}


def train(folder: str, method: str, output: str) -> None:
    """Load and train as one rank, and write what was measured."""
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        f"{output}-trainer", max_steps=STEPS, per_device_train_batch_size=TOKENS[0], save_strategy="no", use_cpu=True,
        report_to="none", disable_tqdm=True, optim="adamw_torch_fused",
    )  # fmt: skip
    settings: dict[str, Any] = {}
    if method == "qlora":
        import bitsandbytes.functional  # noqa: F401 - of the imported libraries

        from modeling_deepseekmoe.quantization.config import StackedExpertsConfig

        settings["quantization_config"] = StackedExpertsConfig(format="nf4")
    memory = Memory()
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        settings["distributed_config"] = DistributedConfig(fsdp_size=ranks)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    loading, loaded = memory.peak_since(), memory.now() - memory.base
    if method in ("lora", "qlora"):
        model = get_peft_model(
            model, expert_lora_config(model, r=RANK, target_modules=("self_attn", "shared_experts"))
        )
    ShardedTrainer(model, arguments, train_dataset=Blocks()).train()
    mapped = mapped_weights(model)
    found = {"loading": loading, "loaded": loaded, "training": memory.peak_since() + mapped, "mapped": mapped,
             "resident": memory.read("VmHWM")}  # fmt: skip
    Path(f"{output}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        os._exit(0)


def measure(folder: str, method: str, ranks: int, scratch: Path) -> dict[str, int]:
    """Measure one case in processes of its own. Return the largest figures of all ranks."""
    output = scratch / f"{method}-{ranks}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, __file__, "--rank-of", method, "--folder", folder, "--output", str(output)]
    # Else the C library keeps memory that is free: 0.2 to 0.3 GB here, by the order of what comes and goes.
    subprocess.run(
        command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    )
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(scratch.glob(f"{method}-{ranks}-*.json"))]
    return {name: max(rank[name] for rank in found) for name in found[0]}


def main() -> None:
    """Measure and report all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is written")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        return train(str(options.folder), options.rank_of, options.output)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "checkpoint"
        config = DeepseekMoeConfig(**CONFIG)
        if not (folder / "config.json").exists():
            DeepseekMoeForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
        rows = []
        for method, ranks in CASES:
            plan = plan_memory(
                config, Layout("", shards=ranks), method=method, weights="float32", compute="float32", lora_rank=RANK,
                tokens=TOKENS[0] * TOKENS[1], checkpointing=False, cuda=False,
            )  # fmt: skip
            measured = measure(str(folder), method, ranks, Path(scratch))
            rows.append({"method": method, "ranks": ranks, **measured, "planned": plan.total, "parts": plan.parts})
            print(json.dumps(rows[-1]), flush=True)
        layer = sum(p.numel() for name, p in CountedModel.of(config).parameters.items() if ".layers.0." in name) * 4
        if not report(rows, plan.parameters, layer):
            sys.exit(1)
    return None


def report(rows: list[dict[str, Any]], parameters: int, layer: int) -> bool:
    """Print the table and which limits are kept, and write the results. Return whether all limits are kept."""
    alone = {row["method"]: row for row in rows if row["ranks"] == 1}
    print(f"\n{parameters:,} parameters, float32, GB\n")
    print("| method | ranks | while loading | loaded | while training | of one process | resident | planned | off |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        row["share"] = row["training"] / alone[row["method"]]["training"]
        row["resident_share"] = row["resident"] / alone[row["method"]]["resident"]
        row["off"] = row["planned"] / row["training"] - 1
        cells = [f"{row[name] / 1e9:.2f}" for name in ("loading", "loaded", "training")]
        cells += [f"{row['share']:.0%}", f"{row['resident'] / 1e9:.2f} ({row['resident_share']:.0%})"]
        cells += [f"{row['planned'] / 1e9:.2f}", f"{row['off']:+.0%}"]
        print(f"| {row['method']} | {row['ranks']} | " + " | ".join(cells) + " |")
    sharded = [row for row in rows if row["ranks"] > 1]
    kept = {
        "full training needs at most 60% of one process": sharded[0]["share"] <= MOST_OF_ONE_PROCESS,
        "so does all resident memory": sharded[0]["resident_share"] <= MOST_OF_ONE_PROCESS,
        "loading needs at most the shard and one layer": all(
            row["loading"] <= row["loaded"] + layer for row in sharded
        ),
        "the plan is within 15%": all(abs(row["off"]) <= MOST_OFF for row in rows),
        "that of quantised experts within 10%": all(
            abs(row["off"]) <= MOST_OFF_QUANTISED for row in rows if row["method"] == "qlora"
        ),
    }
    for limit, is_kept in kept.items():
        print(f"{limit}: {'yes' if is_kept else 'NO'}")
    results = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "parameters": parameters, "tokens": TOKENS, "cases": rows, "limits": kept,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return all(kept.values())


if __name__ == "__main__":
    main()
