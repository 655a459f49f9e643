"""An extension of the API reference: public names at the module that a reader imports them from.

The package imports its public names when they are first used, from a dictionary `_LAZY`, and the folders conversion/
and configuration/ stand beside it. The reference reads sources without running them, and knows of neither.
"""

import ast
import re
from pathlib import Path
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object

PACKAGE = "modeling_deepseekmoe"
FOLDERS = ("configuration", "conversion")
ROOT = Path(__file__).parents[1]
TYPE = re.compile(r"^ +\w+(?:, \w+)* \(.*?\):(?= |$)", re.MULTILINE)  # of an argument: name (`type` of shape (N,)):
NAME = re.compile(r"\[`([\w.]+)`\](?![\[(])")


def constant(path: Path, name: str, default: Any) -> Any:
    """Read a constant of a module, without running it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    return default


def public_names() -> dict[str, str]:
    """Name the path of every public name."""
    paths = {PACKAGE: ROOT / PACKAGE} | {f"{PACKAGE}.{folder}": ROOT / folder for folder in FOLDERS}
    return {
        name: f"{module}.{name}"
        for module, folder in paths.items()
        for name in constant(folder / "__init__.py", "__all__", [])
    }


class LazyNames(Extension):
    """Adds the folders to the package, and to each module the names that it imports when they are first used."""

    def __init__(self) -> None:
        self.places = public_names()

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Complete the package once it is read."""
        if pkg.path != PACKAGE:
            return
        for name in FOLDERS:
            pkg.set_member(name, loader.load(name, try_relative_path=False))
        for module in (pkg, *(pkg[name] for name in FOLDERS)):
            for place, names in constant(Path(module.filepath), "_LAZY", {}).items():
                for name in names:
                    module.set_member(name, Alias(name, f"{module.path}.{place}.{name}"))

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Make links of the public names in brackets of a docstring, and take the Markdown out of its types, which are
        shown as code."""
        if obj.docstring:
            text = TYPE.sub(lambda match: re.sub("[`*]", "", match[0]), obj.docstring.value)
            obj.docstring.value = NAME.sub(self.link, text)

    def link(self, match: re.Match[str]) -> str:
        """Refer to a public name; show any other as it is."""
        name = match[1]
        return f"[`{name}`][{self.places[name]}]" if name in self.places else f"`{name}`"
