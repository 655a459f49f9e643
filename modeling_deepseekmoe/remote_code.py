# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""The code that travels to the Hub beside a model's weights, and the `auto_map` that names its classes.

Ordinary checkpoints carry no code. [`attach_code`] puts it into a folder that is being published. A config that is
saved into such a folder names it again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

CODE_VERSION = "0.17.0"  # of the package, and of the copies of these files on the Hub
CODE_CHOICES = ("auto", "always", "never")
NATIVE_TYPES = ("deepseek_v2", "deepseek_v3")  # which transformers has classes of its own for
# The prefix of the class names of each model type.
_PREFIXES = {
    "deepseekmoe": "DeepseekMoe",
    "deepseek": "Deepseek",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}
_AUTO_CLASSES = {
    "AutoModel": ("modeling_deepseekmoe", "Model"),
    "AutoModelForCausalLM": ("modeling_deepseekmoe", "ForCausalLM"),
    "AutoModelForSequenceClassification": ("modeling_classification", "ForSequenceClassification"),
    "AutoModelForTokenClassification": ("modeling_classification", "ForTokenClassification"),
}
_CONFIG_NAME = "config.json"
CODE_MARK = "remote_code.py"  # this file: where it lies, the others do
# Files of the code up to 0.10.0 that have other names now, and how the SHA-256 of what was released begins.
_FORMER_FILES = {
    "balancing.py": ("6970ab5e347c848b", "c07ba355c0286181"),
    "gate.py": ("a2a1b78fd18b7ebb", "45f7b404b2cb1655"),
    "grouped_products.py": ("fffe86ee2e5ddd12", "b725c3619bfe9493", "8681b4dcdfd67a2c"),
    "replaced_forward.py": ("f23e97b70f38a14a", "0b1ecbe38da6a1ae", "14ff957ae97aa535"),
}
# Whether this is a copy that was loaded from the Hub: transformers carries such a one by itself.
_IS_COPY = __name__.startswith("transformers_modules.")


def carries_code(model_type: str, code: str = "auto") -> bool:
    """Tell whether the code is published with a model of this type.

    Args:
        model_type: the config's.
        code: `"auto"` (only where transformers has no classes of its own), `"always"` or `"never"`.

    Raises:
        ValueError: for another `code`.
    """
    if code not in CODE_CHOICES:
        raise ValueError(f"code={code!r} is not allowed: it must be one of {', '.join(map(repr, CODE_CHOICES))}.")
    return code == "always" or (code == "auto" and model_type in _PREFIXES and model_type not in NATIVE_TYPES)


def auto_map_of(model_type: str) -> dict[str, str]:
    """Return the `auto_map` of a config of the family: for every Auto class, the file and the class in it."""
    prefix = _PREFIXES[model_type]
    config_module = "configuration_deepseekmoe" if model_type == "deepseekmoe" else "configuration_dialects"
    classes = {name: f"{module}.{prefix}{head}" for name, (module, head) in _AUTO_CLASSES.items()}
    return {"AutoConfig": f"{config_module}.{prefix}Config", **classes}


def auto_classes_of(model_type: str) -> dict[str, str]:
    """Return for every model class of a type, by its name, the Auto class that loads it."""
    return {target.partition(".")[2]: name for name, target in auto_map_of(model_type).items() if name != "AutoConfig"}


@cache
def code_files() -> Mapping[str, Path]:
    """Return the files that travel, by name: those of the `auto_map`, and what they import from beside them."""
    return MappingProxyType(code_files_from(Path(__file__).parent))


def code_files_from(folder: Path) -> dict[str, Path]:
    """Return the [`code_files`] that lie in another folder, perhaps among other files.

    A model that was fine-tuned elsewhere may lack the entry points for other heads.

    Raises:
        FileNotFoundError: if a file is missing that another one imports.
    """
    from .transformers_support import get_relative_import_files

    entry_points = {target.split(".")[0] for kind in _PREFIXES for target in auto_map_of(kind).values()}
    found: dict[str, Path] = {}
    for entry_point in entry_points:
        file = folder / f"{entry_point}.py"
        if not file.is_file():
            continue
        for path in (file, *map(Path, get_relative_import_files(file))):
            found[path.name] = path
    return dict(sorted(found.items()))


def code_names_in(folder: str | Path) -> set[str]:
    """Return the names of the family's code in a folder, of any released version; none if the code is not there.

    They are those that the code there imports, and former files that newer code was put beside. A file of somebody
    else that has such a name is not among them.
    """
    folder = Path(folder)
    if not (folder / CODE_MARK).is_file():
        return set()
    try:
        found = set(code_files_from(folder))
    except FileNotFoundError:  # somebody has taken a file away
        found = {path.name for path in folder.glob("*.py")} - _FORMER_FILES.keys()
    left_over = {name for name in _FORMER_FILES if _is_former(folder / name)}
    return found & all_code_names() | left_over


def all_code_names() -> set[str]:
    """Return the names that files of the code have, or had in a released version."""
    return {*code_files(), *_FORMER_FILES}


def _is_former(file: Path) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest()[:16] in _FORMER_FILES[file.name]


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a dictionary without one of its keys."""
    return {key: value for key, value in content.items() if key != name}


def without_local_code(auto_map: dict[str, Any] | None) -> dict[str, Any]:
    """Return the entries of an `auto_map` that name the code of other repositories, `repository--module.Class`."""
    return auto_map_among((), "", auto_map)


def auto_map_among(files: Iterable[str], model_type: str, auto_map: dict[str, Any] | None) -> dict[str, Any]:
    """Make the `auto_map` of a config that lies beside these files.

    It names this code if that is among the files. It keeps what the config named so far in these files or in other
    repositories. In an ordinary folder nothing is left.

    Args:
        files: names of the files beside the config.
        model_type: the config's.
        auto_map: what the config has named so far.
    """
    there = set(files)

    def is_there(target: str) -> bool:
        return "--" in target or f"{target.split('.')[0]}.py" in there

    own = auto_map_of(model_type) if model_type in _PREFIXES else {}
    named = {**(auto_map or {}), **{name: target for name, target in own.items() if is_there(target)}}
    return {name: targets for name, targets in named.items() if all(map(is_there, _list(targets)))}


def _list(targets: Any) -> list[str]:
    """Return an entry of an `auto_map` as a list. It may hold several classes, or none in place of one."""
    return [target for target in (targets if isinstance(targets, (list, tuple)) else [targets]) if target]


def check_place_for_code(folder: str | Path) -> set[str]:
    """Return the [`code_names_in`] a folder.

    Raises:
        ValueError: if somebody's own files have the names of the code, which would replace them.
    """
    folder = Path(folder)
    own = code_names_in(folder)
    there = {name: path for name, path in code_files().items() if (folder / name).is_file()}
    foreign = [name for name in there.keys() - own if not _same(folder / name, there[name])]
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(sorted(foreign))}: these are names of the family's code, which goes there. "
            "These files are not of it: rename them."
        )
    return own


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def attach_code(folder: str | Path) -> None:
    """Copy the code into a checkpoint folder that is being published, and name it in the `config.json` there, if any.

    Raises:
        ValueError: if files of the same names lie there that are not this code.
    """
    folder = Path(folder)
    former = check_place_for_code(folder) - code_files().keys()
    for name, path in code_files().items():
        _write(folder / name, path.read_bytes())
    for name in former:
        (folder / name).unlink()
    config = folder / _CONFIG_NAME
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        there = [path.name for path in folder.iterdir()]
        content["auto_map"] = auto_map_among(there, content["model_type"], content.get("auto_map"))
        _write(config, as_json(content))


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return a config as JSON, in the form that transformers writes."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _write(file: Path, content: bytes) -> None:
    """Replace a file in one step, unless it has this content already."""
    if file.is_file() and file.read_bytes() == content:
        return
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as unfinished:
        unfinished.write(content)
    os.chmod(unfinished.name, 0o644)
    os.replace(unfinished.name, file)


class NoCode:
    """An empty `auto_map` of a class, until an instance has one.

    Trainers of other libraries read it without asking if it is there. transformers writes into what it finds, which
    makes it the instance's own.
    """

    def __get__(self, config: Any, owner: Any) -> dict[str, Any]:
        return _Unwritten(config)


class _Unwritten(dict):
    """An empty `auto_map` that becomes its config's with the first entry."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._config = config

    def __setitem__(self, name: str, target: Any) -> None:
        super().__setitem__(name, target)
        if self._config is not None:
            self._config.auto_map = dict(self)


class CarriesCode:
    """A mixin for what is published with the code of the family, if transformers does not know its model type."""

    def _upload_modified_files(
        self, working_dir: Any, repo_id: str, files_timestamps: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        """Do as transformers does: upload what has changed in a folder since these times. Attach the code before."""
        config: Any = getattr(self, "config", self)
        if not _IS_COPY and carries_code(config.model_type):
            attach_code(working_dir)
            unchanged = {_CONFIG_NAME, *code_files()}  # in the folder, but perhaps not in this repository
            files_timestamps = {name: time for name, time in files_timestamps.items() if name not in unchanged}
        parent: Any = super()
        return parent._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)


class PublishedModel(CarriesCode):
    """A mixin for the models of the family: the package publishes them."""

    # The package sets these: its `push_to_hub`, and its check of a folder that transformers is about to upload.
    publisher: ClassVar[Callable[..., str] | None] = None
    preflight: ClassVar[Callable[[str | Path], None] | None] = None

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the model to the Hub in one commit, after checks, with a model card and with its code.

        Args:
            repo_id (`str`): repository, `user/name`. It is made if it does not exist.
            kwargs: those of `push_model` of the package, or of transformers' `push_to_hub` if the package is
                not installed.

        Returns:
            The address of the commit.
        """
        publisher = type(self).publisher
        if publisher is None:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
        return publisher(self, repo_id, **kwargs)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Do as [`CarriesCode`] does, after a check. `save_pretrained(push_to_hub=True)` calls this."""
        preflight = type(self).preflight
        if preflight is not None:
            preflight(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


__all__ = [
    "CODE_CHOICES",
    "CODE_MARK",
    "CODE_VERSION",
    "NATIVE_TYPES",
    "CarriesCode",
    "NoCode",
    "PublishedModel",
    "all_code_names",
    "as_json",
    "attach_code",
    "auto_classes_of",
    "auto_map_among",
    "carries_code",
    "check_place_for_code",
    "code_files",
    "code_files_from",
    "code_names_in",
    "without",
    "without_local_code",
]
