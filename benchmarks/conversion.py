"""Measure the conversion of checkpoints: its memory, and its speed against `cp`.

The synthetic checkpoint has the tensors of DeepSeekMoE 16B (hidden 2048, 64 experts of width 1408, vocabulary 102400),
random, in bfloat16, with as many layers as the size asks for. Every conversion runs in a process of its own. Its
anonymous resident memory (`RssAnon`) and mapped files are sampled from the operating system. `cp` and the conversions
take turns, in both orders. Before the next one begins, what the last one left in the page cache is written to the
disk. Every result is verified against its source, value by value. Before all this, SmolLM2-135M is upcycled.

    python benchmarks/conversion.py [--sizes 2 8] [--rounds 3] [--folder FOLDER]

Prints a table and whether the limits are kept. Writes benchmarks/results/conversion.json.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors
import torch
from transformers import AutoModelForCausalLM

from modeling_deepseekmoe import DeepseekConfig
from modeling_deepseekmoe.conversion import verify
from modeling_deepseekmoe.conversion.checkpoint import StoredTensor, TensorSource
from modeling_deepseekmoe.conversion.locating import locate
from modeling_deepseekmoe.conversion.targets import Target, outputs, outputs_of
from modeling_deepseekmoe.conversion.tensor_table import entries
from modeling_deepseekmoe.conversion.upcycling.upcycle import save_dequantized
from modeling_deepseekmoe.conversion.writing import FolderPlan, make_shards, write_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo_data import obtain_dense_model

RESULTS = Path(__file__).parent / "results" / "conversion.json"
SHARD = "2GB"
# Name of a case and its arguments for `deepseekmoe convert`; which of them start from another one's result.
CASES = {
    "per-expert to stacked": ("--layout", "stacked"),
    "stacked to per-expert": ("--layout", "per-expert"),
    "per-expert to stacked, float32": ("--layout", "stacked", "--dtype", "float32"),
    "bfloat16 to FP8": ("--dtype", "fp8"),
    "FP8 to bfloat16": ("--dtype", "bfloat16"),
}
SOURCES = {"stacked to per-expert": "stacked", "FP8 to bfloat16": "fp8"}
SAMPLING = 0.02  # seconds
LAYOUT_CASES = ("per-expert to stacked", "stacked to per-expert")  # nothing is computed
MOST_MEMORY, MOST_GROWTH, LEAST_SPEED = 1.0e9, 1.2, 0.6
UPCYCLING_MEMORY, UPCYCLING_LOGITS = 1.5e9, 1e-3


class RandomTensors(TensorSource):
    """Tensors of small random values, the same ones again and again."""

    def __init__(self, tensors: list[StoredTensor]) -> None:
        super().__init__(tensors)
        torch.manual_seed(0)
        self.values = (torch.randn(2**24) * 0.02).to(torch.bfloat16)

    def read(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Return a part of the values."""
        return self.values[: last - first]


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write the synthetic checkpoint. Return its size in bytes."""
    layers = 2
    while size_of(config_of(layers)) < gigabytes * 1e9:
        layers += 1
    config = config_of(layers)
    wanted = entries(config)
    source = RandomTensors([StoredTensor(name, torch.bfloat16, entry.shape) for name, entry in wanted.items()])
    located = locate(wanted, source.tensors, config.n_routed_experts)
    keep = Target("keep")
    tensors = {name: outputs_of(entry, located.matrices[name], keep) for name, entry in wanted.items()}
    shards = make_shards(list(outputs(wanted, tensors, "per-expert", config.n_routed_experts)), SHARD)
    text = config.to_json_string().encode()
    write_folder(FolderPlan(shards, {"config.json": text}), source, folder)
    return folder_size(folder)


def config_of(layers: int) -> DeepseekConfig:
    """Make the config of DeepSeekMoE 16B with fewer layers."""
    return DeepseekConfig(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=layers,
        num_attention_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        first_k_dense_replace=1, dtype="bfloat16", architectures=["DeepseekForCausalLM"],
    )  # fmt: skip


def size_of(config: DeepseekConfig) -> int:
    """Count the bytes of the weights in bfloat16."""
    return sum(2 * StoredTensor("", torch.bfloat16, entry.shape).numel for entry in entries(config).values())


def folder_size(folder: Path) -> int:
    """Count the bytes of all files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def copy(source: Path, destination: Path) -> dict[str, float]:
    """Run `cp -r`, and time it."""
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    return {"seconds": time.perf_counter() - started, "bytes": folder_size(destination)}


def run(*arguments: object) -> dict[str, float]:
    """Run `deepseekmoe` in its own process. Return its time, peaks of memory, and most files mapped at once."""
    os.sync()
    command = [sys.executable, "-m", "modeling_deepseekmoe.cli", *map(str, arguments)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = {"RssAnon": 0, "VmRSS": 0}
    mapped = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(value.split()[0]) * 1024)
        files = {line.split()[-1] for line in maps.splitlines() if line.endswith(".safetensors")}
        mapped = max(mapped, len(files))
        time.sleep(SAMPLING)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "rss_anon": peak["RssAnon"], "rss": peak["VmRSS"], "mapped": mapped}


def convert(source: Path, destination: Path, arguments: tuple[str, ...]) -> dict[str, float]:
    """Convert a checkpoint, and measure that."""
    result = run("convert", source, destination, *arguments, "--max-shard-size", SHARD)
    return result | {"bytes": folder_size(destination)}


def measure_upcycling(folder: Path) -> list[dict[str, Any]]:
    """Upcycle SmolLM2-135M in both dialects.

    Return what the check says, and logits and text of the model when it is loaded as a user would.
    """
    dense_folder, prompt = folder / "dense", "The `for` statement is used to iterate over"
    dense, tokenizer, _ = obtain_dense_model(folder, print)
    save_dequantized(dense, dense_folder)
    tokenizer.save_pretrained(dense_folder)
    tokens = tokenizer(prompt, return_tensors="pt")
    settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    results = []
    with torch.no_grad():
        expected, text = dense(**tokens).logits, dense.generate(**tokens, **settings)
    for dialect in ("deepseekmoe", "deepseek"):
        plan = ("--shared-width", 384, "--shards", 6, "--copies", 4, "--check-tokens", 64, "--dialect", dialect)
        result = run("upcycle", dense_folder, folder / dialect, *plan)
        model = AutoModelForCausalLM.from_pretrained(folder / dialect).eval()
        with torch.no_grad():
            difference = float((model(**tokens).logits - expected).abs().max())
            same = torch.equal(model.generate(**tokens, **settings), text)
        results.append({"dialect": dialect, **result, "max_logit_difference": difference, "same_text": same})
        print(results[-1], flush=True)
        shutil.rmtree(folder / dialect)
    return results


def measure(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Measure all cases for one size."""
    source = folder / "source"
    size = make_checkpoint(source, gigabytes)
    result: dict[str, Any] = {"gigabytes": size / 1e9, "files": len(list(source.glob("*.safetensors"))), "cases": {}}
    sources = {"source": source}
    for name, arguments in CASES.items():
        start, runs = sources[SOURCES.get(name, "source")], []
        number_of_rounds = rounds if name in LAYOUT_CASES else 1
        for number in range(number_of_rounds):
            if number % 2 == 0:
                reference = copy(start, folder / "copy")
                run_ = convert(start, folder / "converted", arguments)
            else:
                run_ = convert(start, folder / "converted", arguments)
                reference = copy(start, folder / "copy")
            shutil.rmtree(folder / "copy")
            # Bytes a second, of what is written; `cp` writes what it reads.
            run_["of_cp"] = (run_["bytes"] / run_["seconds"]) / (reference["bytes"] / reference["seconds"])
            run_["cp_seconds"] = reference["seconds"]
            runs.append(run_)
            if number < number_of_rounds - 1:
                shutil.rmtree(folder / "converted")
        compared = verify(start, folder / "converted").compared
        kept = {"per-expert to stacked": "stacked", "bfloat16 to FP8": "fp8"}.get(name)
        if kept:
            sources[kept] = (folder / "converted").rename(folder / kept)
        else:
            shutil.rmtree(folder / "converted")
        if SOURCES.get(name):
            shutil.rmtree(sources[SOURCES[name]])
        result["cases"][name] = {
            key: statistics.median(run_[key] for run_ in runs) for key in ("seconds", "cp_seconds", "of_cp", "bytes")
        } | {
            "rss_anon": max(run_["rss_anon"] for run_ in runs),
            "mapped": max(run_["mapped"] for run_ in runs),
            "rounds": number_of_rounds,
            "compared": compared,
        }
        print(f"{size / 1e9:.2f} GB, {name}: {result['cases'][name]}", flush=True)
    shutil.rmtree(source)
    return result


def verdict(results: list[dict[str, Any]], upcycling: list[dict[str, Any]]) -> list[str]:
    """List what is not within the limits."""
    failures = []
    for name in CASES:
        cases = [result["cases"][name] for result in results]
        for result, case in zip(results, cases, strict=True):
            where = f"{result['gigabytes']:.1f} GB, {name}"
            if case["rss_anon"] > MOST_MEMORY:
                failures.append(f"{where}: {case['rss_anon'] / 1e6:.0f} MB of memory")
            if case["mapped"] > 1:
                failures.append(f"{where}: {case['mapped']} files mapped at once")
        peaks = [case["rss_anon"] for case in cases]
        if max(peaks) > MOST_GROWTH * min(peaks):
            failures.append(f"{name}: memory grows with the size, {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} MB")
        if name in LAYOUT_CASES and cases[-1]["of_cp"] < LEAST_SPEED:
            failures.append(f"{name}: {cases[-1]['of_cp']:.0%} of the speed of cp")
    for row in upcycling:
        if (
            row["rss_anon"] > UPCYCLING_MEMORY
            or row["max_logit_difference"] > UPCYCLING_LOGITS
            or not row["same_text"]
        ):
            failures.append(f"upcycling to {row['dialect']}: {row}")
    return failures


def main() -> None:
    """Measure, print and save the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[2.0, 8.0], help="GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; needs four times the largest size")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        upcycling = measure_upcycling(Path(folder))
    results = []
    for gigabytes in options.sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            results.append(measure(Path(folder), gigabytes, options.rounds))
    content = {
        "torch": torch.__version__, "safetensors": safetensors.__version__, "python": platform.python_version(),
        "cpus": os.cpu_count(), "rounds": options.rounds, "results": results,
        "upcycling": upcycling,
    }  # fmt: skip
    options.output.write_text(json.dumps(content, indent=2) + "\n")
    print(
        "\n| checkpoint | conversion | time | `cp` of the source | bytes written a second, of `cp` "
        "| peak RssAnon | files mapped at once |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        for name, case in result["cases"].items():
            print(
                f"| {result['gigabytes']:.2f} GB, {result['files']} files | {name} | {case['seconds']:.1f} s "
                f"| {case['cp_seconds']:.1f} s | {case['of_cp']:.0%} | {case['rss_anon'] / 1e6:.0f} MB "
                f"| {case['mapped']} |"
            )
    print(
        "\n| SmolLM2-135M to | time | peak RssAnon | largest logit difference | greedy text of 64 tokens |"
        "\n| --- | --- | --- | --- | --- |"
    )
    for row in upcycling:
        print(
            f"| {row['dialect']} | {row['seconds']:.0f} s | {row['rss_anon'] / 1e6:.0f} MB "
            f"| {row['max_logit_difference']:.1e} | {'the same' if row['same_text'] else 'not the same'} |"
        )
    failures = verdict(results, upcycling)
    print("\n" + ("\n".join(failures) or "All limits are kept."))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
