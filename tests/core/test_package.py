"""The package itself: public names, layers of the files that travel to the Hub, docstrings, dependencies."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paths import ROOT

import modeling_deepseekmoe
from modeling_deepseekmoe.remote_code import code_files

CORE = ROOT / "modeling_deepseekmoe"
# Flat in the package: these travel to the Hub beside the weights and must work where the package is not installed.
TRAVELLING = sorted(path.stem for path in CORE.glob("*.py") if path.stem != "__init__")
KERNELS = ("experts_blocks", "experts_decoding", "experts_kernels", "routing_kernels")
PYTHON = ("modeling_deepseekmoe", "configuration", "conversion", "examples", "benchmarks", "tests")
FOREIGN = ("torch", "transformers", "safetensors")
OPTIONAL = {
    "triton_support": "triton",
    "experts_quantized": "bitsandbytes",
}  # imported only if it is there: `test_publishing` runs without
PUBLIC_MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(modeling_deepseekmoe.__path__, "modeling_deepseekmoe.")
    if not name.endswith(("__main__", "paths"))
) + [
    f"modeling_deepseekmoe.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}".removesuffix(".__init__")
    for folder in ("configuration", "conversion")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("name", TRAVELLING)
def test_flat_files_import_nothing_that_does_not_travel(name: str) -> None:
    for level, module in imports(CORE / f"{name}.py"):
        if level:
            assert level == 1 and module in TRAVELLING, f"{name}: from {'.' * level}{module}"
        else:
            top = module.split(".")[0]
            allowed = top in FOREIGN or top in sys.stdlib_module_names or top == OPTIONAL.get(name)
            assert allowed, f"{name}: {module}"


def test_the_flat_files_are_those_that_travel() -> None:
    assert set(code_files()) == {f"{name}.py" for name in TRAVELLING}
    for path in code_files().values():
        assert path.parent == CORE
        # transformers finds what is imported by this form alone.
        assert len(re.findall(r"^\s*from \.", path.read_text(), re.MULTILINE)) == len(
            re.findall(r"^\s*from \.\w+ import", path.read_text(), re.MULTILINE)
        )


def test_public_api() -> None:
    names = modeling_deepseekmoe.__all__
    assert names == sorted(set(names))
    assert dir(modeling_deepseekmoe) == names
    for name in names:
        assert getattr(modeling_deepseekmoe, name) is not None
    for prefix in ("DeepseekMoe", "Deepseek", "DeepseekV2", "DeepseekV3"):
        for head in ("Config", "Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"):
            assert prefix + head in names
    with pytest.raises(AttributeError, match="no attribute 'DeepseekV9Model'"):
        _ = modeling_deepseekmoe.DeepseekV9Model


@pytest.mark.parametrize("name", ["", ".conversion", ".configuration"])
def test_the_reference_has_every_public_name(name: str) -> None:
    module = importlib.import_module(f"modeling_deepseekmoe{name}")
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    aliases = {"RoutingPlan"}
    for exported in set(module.__all__) - aliases:
        assert f"::: {module.__name__}.{exported}\n" in page, exported


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_are_documented_and_typed(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for exported in getattr(module, "__all__", []):
        item = getattr(module, exported)
        if not (inspect.isclass(item) or inspect.isfunction(item)):
            continue
        assert item.__doc__, f"{name}.{exported} has no docstring"
        functions = [item] if inspect.isfunction(item) else [
            member for key, member in vars(item).items() if inspect.isfunction(member) and not key.startswith("_")
        ]  # fmt: skip
        for function in functions:
            if function.__module__ == module.__name__:
                assert function.__doc__, function.__qualname__
                parameters = set(inspect.signature(function).parameters) - {"self", "cls"}
                assert function.__annotations__.keys() >= parameters | {"return"}, function.__qualname__


def test_every_module_has_an_explicit_all() -> None:
    for name in PUBLIC_MODULES:
        module = importlib.import_module(name)
        if not hasattr(module, "__path__"):  # a folder has no names of its own
            assert isinstance(module.__all__, list), name
        for exported in getattr(module, "__all__", ()):
            assert hasattr(module, exported), f"{name}.{exported}"


def test_configuration_and_conversion_are_imported_by_their_full_names() -> None:
    for path in [path for folder in PYTHON for path in (ROOT / folder).rglob("*.py")]:
        for level, module in imports(path):
            assert level or module.split(".")[0] not in ("configuration", "conversion"), path


def test_python_blocks_of_the_readme_compile_and_its_commands_exist() -> None:
    from typer.testing import CliRunner

    from modeling_deepseekmoe.cli.app import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modeling_deepseekmoe"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), alias.name
    for command in re.findall(r"^deepseekmoe ([\w-]+)", readme, re.MULTILINE):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
    assert "RESULTS" not in readme


def test_dependencies_are_the_agreed_ones() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"torch", "transformers", "accelerate", "peft", "safetensors", "huggingface-hub"}
    assert project["version"] == modeling_deepseekmoe.__version__


def test_version_is_in_the_changelog() -> None:
    assert f"## [{modeling_deepseekmoe.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_files_are_short_enough_to_read() -> None:
    for path in [path for folder in PYTHON for path in (ROOT / folder).rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_functions_are_short_and_take_few_arguments() -> None:
    """Kernels take what Triton passes, and `forward`, `route` and the operators what their callers do."""
    free = {"add_auxiliary_loss", "forward", "route", "_route"}
    for path in [path for folder in PYTHON for path in (ROOT / folder).rglob("*.py")]:
        if path.parent == CORE and path.stem in KERNELS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                given = node.args
                names = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                count = sum(name is not None and name.arg not in ("self", "cls") for name in names)
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"
                assert count <= 8 or node.name in free, f"{path.name}: {node.name} takes {count} arguments"


def test_every_folder_of_code_is_in_the_wheel() -> None:
    """What pip builds has the listed packages alone, and an editable install all of them."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for top in ("modeling_deepseekmoe", "configuration", "conversion")
               for path in (ROOT / top).rglob("__init__.py")]  # fmt: skip
    names = {".".join(folder.parts) for folder in folders}
    assert {name if name.startswith("modeling") else f"modeling_deepseekmoe.{name}" for name in names} == set(listed)


@pytest.mark.slow
def test_the_wheel_holds_everything_and_nothing_beside_the_package(tmp_path: Path) -> None:
    """Installed elsewhere and used from another folder; building it fetches setuptools."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    assert {path.name.split("-")[0] for path in (tmp_path / "site").iterdir()} == {"bin", "modeling_deepseekmoe"}
    script = (
        "import importlib, sys\n"
        f"for name in {PUBLIC_MODULES!r}:\n"
        "    module = importlib.import_module(name)\n"
        f"    assert module.__file__.startswith({str(tmp_path)!r}), module.__file__\n"
        "from modeling_deepseekmoe.cli.app import app\n"
        "from modeling_deepseekmoe.configuration import list_presets\n"
        "from modeling_deepseekmoe.hub.card import _TEMPLATE\n"
        "assert 'dense' in list_presets() and _TEMPLATE.is_file()\n"
        "sys.argv = ['deepseekmoe', 'inspect', 'deepseek-moe-16b']\n"
        "app()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "16,375,728,128" in ran.stdout


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    """Or rather with none of the words that no verb is."""
    no_verb = re.compile(
        r"(The|An?|What|Whether|How|That|As|Which|Where|Whose|All|Every|Both|One|No|It|This|These|In|Of|For|From|To|With|"
        r"If)\b"
    )
    for folder in ("modeling_deepseekmoe", "configuration", "conversion", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                documented = isinstance(node, ast.FunctionDef) and ast.get_docstring(node)
                if documented and not any("property" in ast.unparse(it) for it in node.decorator_list):
                    assert not no_verb.match(documented), f"{path.name}:{node.lineno}: {documented.splitlines()[0]}"
