"""Write docs/benchmarks.md, and the tables on README.md and other pages, from the results of the benchmarks.

Every figure of the page comes from a file in benchmarks/results. The demo's figures come from
benchmarks/results/demo.json, which `--demo` copies from the folder of a full `make demo`. Without that file the page
has no section about the demo.

    python benchmarks/make_page.py [--demo runs/demo/metrics.json]
    python benchmarks/make_page.py --check
"""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import architecture_results
from page_sections import SECTIONS, Figures, Section, mtp_table, table

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
MTP_PAGE, WHY_PAGE, UPCYCLING_PAGE = (ROOT / "docs" / f"{name}.md" for name in ("mtp", "why-deepseekmoe", "upcycling"))
BEGIN, END = "<!-- figures{name}, by benchmarks/make_page.py -->\n", "<!-- end of the figures -->"
WIDTH = 120
# Under which names the results hold versions and sizes of the machine.
VERSIONS = {"python": "Python", "torch": "torch", "transformers": "transformers", "peft": "PEFT",
            "safetensors": "safetensors", "triton": "Triton"}  # fmt: skip
SIZES = {"threads": "threads", "cores": "cores", "cpus": "cores"}
FOREWORD = """# Benchmarks

Speed, memory and quality, as measured or, where it says so, predicted, and how each figure was obtained. Read this
page to see what you can expect, and what it costs.
"""
AFTERWORD = """## Limits

- On a GPU the experts and routing were measured, once, on one H200 for some minutes; nothing else was.
- Another machine, or one that does other work, gives other times. Compare the ratios: the ways that are compared took
  turns in the same run.
- The models that were trained are small. The methods were not compared at the size of the released models.
"""


def paragraph(text: str) -> str:
    """Join the lines of a text and break them anew."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def conditions(figures: Figures) -> str:
    """Name the device and the versions, as far as the results name them."""
    machine = figures.get("machine", {})
    facts = {**figures, **figures.get("versions", {})}
    if isinstance(machine, dict):
        facts |= machine
    else:
        facts["device"] = machine
    device = [facts["device"]] if "device" in facts else []
    device += [f"{facts[key]} {name}" for key, name in SIZES.items() if key in facts]
    versions = [f"{name} {facts[key]}" for key, name in VERSIONS.items() if key in facts]
    parts = [f"Device: {', '.join(device)}."] if device else []
    parts += [f"Versions: {', '.join(versions)}."] if versions else []
    return " ".join(parts)


def is_text(block: str) -> bool:
    """Tell whether a block is a paragraph, which is broken into lines, and not a table or a picture."""
    return not block.startswith(("|", "!["))


def section(part: Section) -> list[str]:
    """Make a section, or nothing if there are no results."""
    path = RESULTS / f"{part.results}.json"
    if not path.exists():
        return []
    figures = json.loads(path.read_text(encoding="utf-8"))
    first, *rest = part.describe(figures)
    source = f"Script: `{part.script}`. {conditions(figures)}"
    return [f"## {part.title}"] + [paragraph(block) if is_text(block) else block for block in (first, source, *rest)]


def make_page() -> str:
    """Make the whole page."""
    blocks = [FOREWORD.strip()]
    for part in SECTIONS:
        blocks += section(part)
    return "\n\n".join([*blocks, AFTERWORD.strip()]) + "\n"


def load(name: str) -> Figures:
    """Read a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def layer_of_16b() -> list[tuple[str, str, str]]:
    """Make README's line about the experts, or none if the results do not have it."""
    for case in load("experts")["cases"]:
        usual = case.get("condition", "quiet") == "quiet" and case.get("dtype", "float32") == "float32"
        if usual and case["shape"]["name"] == "16B and V2-Lite" and case["tokens"] > 1 and case["kind"] == "forward":
            best, ours = (1e3 * case["seconds"][way] for way in (case["best"], "deepseekmoe"))
            peer = f"transformers {best:,.0f} ms ({case['best']})"
            return [(f"a layer of 16B's experts, {case['tokens']:,} tokens", peer, f"{ours:,.0f} ms")]
    return []


def headline() -> str:
    """Make the table of README: a few figures, each from another benchmark."""
    lora = load("expert_lora")["cases"][0]
    step, token = lora["seconds"]["step"], lora["seconds"]["decode"]
    shape = "{experts} experts, {tokens} tokens, rank {rank}".format(**lora["shape"])
    resumed = {side: found["resumed"]["v3-noaux"] for side, found in load("against_transformers")["sides"].items()}
    rows = [
        ("", "peer", "this package"),
        (f"LoRA on experts, a training step ({shape})", f"plain PEFT {1e3 * step['peft']:,.0f} ms",
         f"{1e3 * step['ours']:,.0f} ms; frozen base {1e3 * step['base']:,.0f} ms"),
        ("the same, one token decoded", f"plain PEFT {1e3 * token['peft']:,.0f} ms",
         f"{1e3 * token['ours']:,.0f} ms; frozen base {1e3 * token['base']:,.0f} ms"),
        *layer_of_16b(),
        ("V3 resumed by Trainer: how far the experts are off", f"transformers {resumed['transformers']:.1f}",
         f"{resumed['modeling_deepseekmoe']:.0f}"),
    ]  # fmt: skip
    return table(rows[0], rows[1:]) + "\n"


def tables() -> dict[Path, dict[str, str]]:
    """Make the tables that stand on other pages, between marks: by the names in these, "" if a page has only one."""
    made = architecture_results.tables()
    found = {README: {"": headline()}, UPCYCLING_PAGE: {"": made.pop("upcycling")}, WHY_PAGE: made}
    if (RESULTS / "mtp.json").exists():
        found[MTP_PAGE] = {"": mtp_table(load("mtp")) + "\n"}
    return found


def with_tables(page: Path, made: dict[str, str]) -> str:
    """Put tables into a page's text, between their marks.

    Raises:
        ValueError: if the page has no such mark.
    """
    text = page.read_text(encoding="utf-8")
    for name, own in made.items():
        mark = BEGIN.format(name=f" of {name}" if name else "")
        before, found, rest = text.partition(mark)
        if not found:
            raise ValueError(f"{page} has no mark {mark.strip()}")
        text = before + mark + own + END + rest.partition(END)[2]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check the one on the disk. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    parser.add_argument("--demo", type=Path, help="metrics.json of the demo, copied to benchmarks/results/demo.json")
    options = parser.parse_args(arguments)
    if options.check:
        others = all(page.read_text(encoding="utf-8") == with_tables(page, made) for page, made in tables().items())
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == make_page() and others:
            return 0
        pages = " or ".join(map(str, (PAGE, *tables())))
        print(f"{pages} is not what the results say: run python benchmarks/make_page.py", file=sys.stderr)
        return 1
    if options.demo:
        shutil.copyfile(options.demo, RESULTS / "demo.json")
    PAGE.write_text(make_page(), encoding="utf-8")
    for page, made in tables().items():
        page.write_text(with_tables(page, made), encoding="utf-8")
    print(f"Written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
