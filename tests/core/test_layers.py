"""The layers of the package: imports point downwards, and in no circle, lazy ones included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from paths import ROOT

import modeling_deepseekmoe

NAME = "modeling_deepseekmoe"
# From below. What lies flat in the package is the core; a folder is a layer of its own.
LAYERS = ("core", "support", "families", "configuration", "drafting", "balancing", "esft", "lora", "sharding",
          "conversion", "quantization", "analysis", "hub", "integrations", "finetuning", "cli")  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package but its root, by its name without that of the package."""
    found = {}
    for folder in (NAME, "configuration", "conversion"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / NAME if folder == NAME else ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    del found[""]
    return found


MODULES = modules()


def layer_of(name: str) -> str:
    return "core" if MODULES[name].parent.name == NAME else name.split(".")[0]


def imported(name: str) -> set[str]:
    """The modules of the package that one imports, wherever in its text. The root is the empty name."""
    found = set()
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == NAME}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == NAME):
            source = package[: len(package) - node.level + 1] if node.level else []
            inside = ".".join([*source, *(node.module or "").split(".")[0 if node.level else 1 :]]).strip(".")
            of_alias = {alias.name: f"{inside}.{alias.name}".strip(".") for alias in node.names}
            found |= {full if full in MODULES else inside for full in of_alias.values()}
    return found - {name}


def test_imports_point_downwards() -> None:
    for name in MODULES:
        for other in imported(name):
            assert other, f"{name} imports the root of the package"
            higher = LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(name))
            assert not higher, f"{name} ({layer_of(name)}) imports {other} ({layer_of(other)}), which lies above it"


def test_every_public_name_has_one_place() -> None:
    names = [name for own in modeling_deepseekmoe._LAZY.values() for name in own]
    assert len(names) == len(set(names))
    assert set(names) <= set(modeling_deepseekmoe.__all__)


def test_imports_have_no_circle() -> None:
    TopologicalSorter({name: imported(name) for name in MODULES}).prepare()  # raises where there is one
