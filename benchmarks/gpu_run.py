"""One command for a GPU that is at hand for some minutes: correctness, speed beside peers, tiles, sanitizer.

    python benchmarks/gpu_run.py [--budget 575] [--out DIR] [--only trial,tests]
    python benchmarks/gpu_run.py --prewarm 90    # before, without a GPU: fill Triton's cache for a compute capability
    python benchmarks/gpu_run.py --dry           # before, without a GPU: every step in the interpreter, small

It needs torch, Triton, transformers, pytest and hypothesis, but no network, and the package need not be installed. The
steps come in the order of their value. Each is a process of its own, with a limit of its own: one that fails, hangs or
crashes leaves what it has written, and the next one begins. After each step the state of all steps is written to
results.json in the folder, beside the log of each step. A table comes last.

The folder is benchmarks/results/gpu, the files there are kept. Triton's cache lies at TRITON_CACHE_DIR, by default
/tmp/deepseekmoe-triton: its path must be the same where it is filled and where it is used.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import RESULTS, write_results

ROOT = Path(__file__).parent.parent
CACHE = os.environ.get("TRITON_CACHE_DIR", "/tmp/deepseekmoe-triton")
RESERVE = 10.0  # seconds of the budget for the table
HERE = "benchmarks"
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Step:
    """A step: what it is called, what runs, in earnest and dry (nothing: it needs a GPU), and the most seconds."""

    name: str
    command: tuple[str, ...]
    dry: tuple[str, ...]
    limit: float


@dataclass
class Outcome:
    """How a step ended."""

    step: str
    end: str
    seconds: float = 0.0


def steps(out: Path) -> list[Step]:
    """List the steps, the most valuable first."""
    kernels = ("-m", "modeling_deepseekmoe.cli", "kernels")
    at_once = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    of_gpu, interpreted = (*TESTS, *at_once, "tests/core/test_gpu.py"), (*TESTS, "tests/core/test_experts_triton.py")
    tune, tiles = f"{HERE}/tune_kernels.py", str(out / "tiles.json")
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    memcheck = (sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable)
    return [
        Step("warm", (f"{HERE}/prewarm_kernels.py", "--present"), (), 150),
        Step("trial", (*kernels, "--again", "--no-time"), (*kernels, "--no-time"), 60),
        Step("tests", (*of_gpu, "-m", "gpu and not generated"), (*interpreted, "-k", "tiles"), 150),
        Step("experts", (f"{HERE}/experts.py", "--budget", "80"), (f"{HERE}/experts.py", "--quick"), 120),
        Step("routing", (f"{HERE}/routing.py", "--budget", "60"), (f"{HERE}/routing.py", "--quick"), 90),
        Step("quantised", (f"{HERE}/quantized_kernels.py", "--budget", "60"),
             (f"{HERE}/quantized_kernels.py", "--quick"), 90),
        Step("tune", (tune, "--budget", "110", "--out", tiles), (tune, "--dry"), 130),
        Step("kernels", kernels, (), 60),
        Step("tuned", (f"DEEPSEEKMOE_TILES={tiles}", *kernels), (), 60),
        Step("generated", (*of_gpu, "-m", "gpu and generated"), (*interpreted, "-k", "generated"), 120),
        Step("sanitizer", (*memcheck, *kernels, "--again", "--no-time"), (), 60),
    ]  # fmt: skip


def environment(dry: bool, package: Path) -> dict[str, str]:
    """Return the environment of the steps."""
    path = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": CACHE, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return {**os.environ, **own, **({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})}


@contextlib.contextmanager
def package() -> Iterator[Path]:
    """Make a folder that a package of links lies in, as setuptools would install it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "modeling_deepseekmoe")
        target.mkdir()
        for source in [*(ROOT / "modeling_deepseekmoe").iterdir(), ROOT / "configuration", ROOT / "conversion"]:
            if source.name != "__pycache__":
                (target / source.name).symlink_to(source)
        yield Path(folder)


def run(step: Step, dry: bool, limit: float, log: Path, env: dict[str, str]) -> str:
    """Run a step. Return how it ended."""
    words = list(step.dry if dry else step.command)
    if not words:
        return "left out: needs a GPU"
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        env = {**env, name: value}
    command = words if Path(words[0]).is_absolute() else [sys.executable, *words]
    if step.name == "sanitizer" and not dry and shutil.which("compute-sanitizer") is None:
        return "left out: compute-sanitizer is not installed"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT,
                                   start_new_session=True)  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s"
    return "ok" if code == 0 else f"failed with {code}"


def main() -> int:
    """Run the steps that fit into the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=575, metavar="SECONDS", help="for all steps together")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder for results and logs")
    parser.add_argument("--only", default="", metavar="STEPS", help="names of steps, with commas")
    parser.add_argument("--dry", action="store_true", help="in the interpreter, on a CPU, small, without a budget")
    parser.add_argument("--prewarm", type=int, metavar="CAPABILITY", help="fill the cache for it, as 90, and stop")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in steps(out) if not arguments.only or step.name in arguments.only.split(",")]
    outcomes: list[Outcome] = []
    with package() as folder:
        env = environment(arguments.dry, folder)
        if arguments.prewarm:
            command = [sys.executable, f"{HERE}/prewarm_kernels.py", "--capability", str(arguments.prewarm)]
            return subprocess.run(command, env=env, cwd=ROOT).returncode
        end = time.monotonic() + arguments.budget - RESERVE
        for step in chosen:
            begin, left = time.monotonic(), end - time.monotonic()
            limit = 600.0 if arguments.dry else min(step.limit, left)
            enough = arguments.dry or left >= min(20.0, step.limit / 2)
            state = run(step, arguments.dry, limit, out / f"{step.name}.log", env) if enough else "left out: no time"
            outcomes.append(Outcome(step.name, state, round(time.monotonic() - begin, 1)))
            for figures in RESULTS.glob("*_gpu.json"):
                shutil.copy(figures, out)
            write_results(out / "results.json", {"dry": arguments.dry, "steps": [asdict(row) for row in outcomes]})
            print(f"## {step.name}: {state}, {outcomes[-1].seconds} s", flush=True)
            if (out / f"{step.name}.log").exists():
                print("\n".join((out / f"{step.name}.log").read_text(errors="replace").splitlines()[-25:]), flush=True)
    print("\n| step | how it ended | seconds |\n| --- | --- | --- |")
    for row in outcomes:
        print(f"| {row.step} | {row.end} | {row.seconds} |")
    return 0 if all(row.end == "ok" or row.end.startswith("left out") for row in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
