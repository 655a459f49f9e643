"""Private names of other libraries stand in one place each, and each has a canary (`test_canaries.py`)."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import test_canaries  # noqa: F401 - fills the list
import test_canaries_of_others  # noqa: F401
from paths import ROOT
from private_names import LISTED

FOLDERS = ("modeling_deepseekmoe", "configuration", "conversion", "examples", "benchmarks")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGE = [path for path in FILES if path.parent.name not in ("examples", "benchmarks")]
PRIVATE = re.compile(r"_[A-Za-z]\w*")
PUBLIC_OF_PYTHON = {"_asdict", "_fields", "_replace", "_make", "_exit", "_MEIPASS"}  # documented there
READ_BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
# Documented modules; what else is imported from these libraries stands in the file that is theirs.
DOCUMENTED = {
    "transformers": {
        "transformers": None,
        "transformers.modeling_outputs": None,
        "transformers.utils": {"ModelOutput", "logging"},
        "transformers.distributed": {"DistributedConfig"},
        "transformers.quantizers": {"AutoHfQuantizer"},
    },
    "peft": {"peft": None, "peft.tuners.lora": {"Linear", "LoraModel"}},
    "huggingface_hub": {"huggingface_hub": None, "huggingface_hub.errors": None, "huggingface_hub.utils": None},
    "accelerate": {"accelerate": None},
}


def place_of(path: Path) -> str:
    """A file's module, without the package's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("modeling_deepseekmoe.")


def own_names() -> set[str]:
    """Private names that the project defines."""
    names: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return {name for name in names if PRIVATE.fullmatch(name)}


def used_names(path: Path) -> dict[str, int]:
    """Private names that a file reads, imports, defines or passes, with a line."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.arg):
            names = [node.arg]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords if keyword.arg]
            if ast.unparse(node.func) in READ_BY_NAME:
                names += [
                    constant.value
                    for argument in node.args[1:2]
                    for constant in ast.walk(argument)
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
                ]
        for name in names:
            if PRIVATE.fullmatch(name):
                found.setdefault(name, getattr(node, "lineno", 0))
    return found


OWN = own_names()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_name_of_another_library_that_is_not_listed(path: Path) -> None:
    for name, line in used_names(path).items():
        if name in LISTED:
            assert place_of(path) in LISTED[name].files, (
                f"{path.name}:{line}: {name} may stand in {LISTED[name].files} alone"
            )
        elif name != "_C":  # on the way to a function that is listed
            assert name in OWN | PUBLIC_OF_PYTHON, f"{path.name}:{line}: {name} is private in another library"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_classes_override_no_private_name_that_is_not_listed(path: Path) -> None:
    if path.stem.startswith("__"):
        return
    name = f"modeling_deepseekmoe.{place_of(path)}"
    machinery = {"_abc_impl", "_backward_cls", "_is_protocol"}  # put there by Python and torch for every class
    for kind in vars(importlib.import_module(name)).values():
        if not inspect.isclass(kind) or kind.__module__ != name:
            continue
        foreign = [base for base in kind.__mro__[1:] if not base.__module__.startswith("modeling_deepseekmoe")]
        for attribute in vars(kind):
            if PRIVATE.fullmatch(attribute) and attribute not in machinery:
                theirs = [base for base in foreign if attribute in vars(base)]
                assert not theirs or attribute in LISTED, f"{kind.__name__}.{attribute} is private in {theirs[0]}"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_inner_modules_are_imported_in_one_place(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            library, names = node.module.split(".")[0], {alias.name for alias in node.names}
            if path.stem == f"{library}_support" or library not in DOCUMENTED:
                continue
            allowed = DOCUMENTED[library].get(node.module, set())
            assert allowed is None or names <= allowed, f"{path.name}:{node.lineno}: {node.module} {names}"


def test_every_listed_name_is_used() -> None:
    """And there are few."""
    used = {place_of(path): set(used_names(path)) for path in PACKAGE}
    for name, listed in LISTED.items():
        for file in listed.files:
            assert name in used[file], f"{name} does not stand in {file}: take it off the list"
    assert len(LISTED) <= 31
