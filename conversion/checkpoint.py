# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Read checkpoint folders tensor by tensor. Headers and index are checked first; one file at a time is mapped."""

import json
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_deepseekmoe.support.folders import CONFIG_NAME, FOREIGN_WEIGHTS, INDEX_NAME, WEIGHTS_NAME

MANIFEST_NAME = "tensors.sha256.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
TEMPLATE_FOLDERS = ("additional_chat_templates",)
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_LISTED_NAMES = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name, dtype, shape: what the tensor is.
        file: the safetensors file. `None` for tensors in memory, or of a plan without weights.
        offset: offset of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


class TensorSource:
    """Named tensors that can be read piece by piece. This class is a plan: it has names and shapes, and no values."""

    def __init__(self, tensors: Iterable[StoredTensor]) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}

    def read(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Read values `first` to `last` (exclusive) of a tensor taken as one row.

        Do not write to them, and let go of them before a tensor of another file is read.
        """
        raise ValueError(f"{tensor.name} has no values here: this is a plan.")


class StateDict(TensorSource):
    """The tensors of a state dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(StoredTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
        self._tensors = tensors

    def read(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Do as [`TensorSource.read`]."""
        return self._tensors[tensor.name].detach().reshape(-1)[first:last]


class Checkpoint(TensorSource):
    """A checkpoint folder in safetensors files.

    Attributes:
        folder: the folder.
        files: its weight files.
        tensors: all tensors by name, in the order of the files.

    Raises:
        ValueError: if weights are pickled, if the index cannot be read, names a file outside the folder or does not
            fit the files, if a file is damaged, or if a tensor is in two files. The message names the file.
        OSError: if a file is missing or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        weight_map = read_index(self.folder)
        self.files = weight_files(self.folder, weight_map)
        tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for tensor in read_header(file):
                if tensor.name in tensors:
                    first = tensors[tensor.name].file
                    raise ValueError(
                        f"Tensor {tensor.name} is in two files, {first.name if first else ''} and {file.name}: one "
                        "is allowed."
                    )
                tensors[tensor.name] = tensor
        if weight_map is not None:
            _check_index(weight_map, tensors)
        super().__init__(tensors.values())
        self._sizes = {file: file.stat().st_size for file in self.files}
        self._mapped: tuple[Path, mmap.mmap] | None = None

    @property
    def identity(self) -> list[object]:
        """What would differ if the files changed, as far as can be told without reading them."""
        places = {tensor.name: tensor.offset for tensor in self.tensors.values()}
        return [places, *(file_identity(file) for file in self.files)]

    def read(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Do as [`TensorSource.read`]. The tensor is a view of the mapped file."""
        if first == last:
            return torch.empty(0, dtype=tensor.dtype)
        assert tensor.file is not None
        offset = tensor.offset + first * tensor.dtype.itemsize
        return torch.frombuffer(self._map(tensor.file), dtype=tensor.dtype, count=last - first, offset=offset)

    def _map(self, file: Path) -> mmap.mmap:
        if self._mapped is None or self._mapped[0] != file:
            # Not closed: a tensor does not lock the mapping that it views. It is unmapped with the last of its views.
            self._mapped = None
            with file.open("rb") as handle:
                # A private mapping, because torch wants memory that it could write to.
                mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(mapped) != self._sizes[file]:
                raise OSError(f"{file.name} has changed while it was read.")
            mapped.madvise(mmap.MADV_SEQUENTIAL)
            self._mapped = (file, mapped)
        return self._mapped[1]


def read_index(folder: Path) -> dict[str, str] | None:
    """Read the file of every tensor from the index. Return `None` for a checkpoint of one file, which has no index.

    Raises:
        ValueError: if the index is not readable, names a file that is not in the folder, or stands beside a
            `model.safetensors`, which readers would take instead.
        OSError: if the folder holds neither.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        return None
    check_inside(index, folder)
    content = parse_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index.name} is not allowed: it must be JSON with an object 'weight_map' of file names.")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"{index.name} names {name!r}, which is not allowed: it must lie in the folder.")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{index.name} names {name!r}, which is not allowed: only .safetensors files are read.")
    if (folder / WEIGHTS_NAME).is_file() and set(weight_map.values()) != {WEIGHTS_NAME}:
        raise ValueError(
            f"{folder} holds {WEIGHTS_NAME}, which {INDEX_NAME} does not name: one of them is stale, and readers "
            "differ in which one they take. Remove it."
        )
    return weight_map


def weight_files(folder: Path, weight_map: dict[str, str] | None = None) -> list[Path]:
    """List the safetensors files of a checkpoint: those of its index, if it has one. Raise as [`read_index`] does."""
    weight_map = read_index(folder) if weight_map is None else weight_map
    names = [WEIGHTS_NAME] if weight_map is None else sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in FOREIGN_WEIGHTS)
        if weight_map is None and pickled:
            raise ValueError(
                f"{folder} holds its weights in {pickled[0]}, which is not allowed: only .safetensors files are read."
            )
        raise FileNotFoundError(f"{folder} lacks {missing[0] if missing else 'any .safetensors file'}.")
    for name in names:
        check_inside(folder / name, folder)
    return [folder / name for name in names]


def read_header(file: Path) -> list[StoredTensor]:
    """Read the names and places of a safetensors file's tensors, in the order of their bytes.

    Raises:
        ValueError: if the header is damaged, or does not fit the size of the file.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(f"File {file.name} is not a readable safetensors file: {reason}.")

    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise refuse(f"its header would be {length} bytes, and the file has {size}")
        try:
            header = json.loads(handle.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise refuse(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise refuse("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refuse("its metadata are no strings")
    tensors = [_entry(name, entry, file, 8 + length, refuse) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise refuse(f"tensor {tensor.name} does not begin where the one before it ends")
        end += tensor.nbytes
    if end != size:
        raise refuse(f"its tensors end at byte {end}, and the file has {size}")
    return tensors


def _entry(name: str, entry: Any, file: Path, data: int, refuse: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"tensor {name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"tensor {name} has the dtype {dtype!r}; allowed are {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise refuse(f"tensor {name} has the shape {shape} and the offsets {offsets}")
    tensor = StoredTensor(name, DTYPES[dtype], tuple(shape), file, data + offsets[0] if offsets else 0)
    if len(offsets) != 2 or offsets[1] - offsets[0] != tensor.nbytes:
        raise refuse(f"tensor {name} of shape {shape} and dtype {dtype} has the offsets {offsets}")
    return tensor


def _check_index(weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    found = {name: tensor.file.name for name, tensor in tensors.items() if tensor.file is not None}
    for name, file in weight_map.items():
        if found.get(name) != file:
            raise ValueError(f"{INDEX_NAME} has tensor {name} in {file}, which does not hold it.")
    unknown = [name for name in found if name not in weight_map]
    if unknown:
        raise ValueError(f"{INDEX_NAME} lacks {listed(unknown)}, which {found[unknown[0]]} holds.")


def parse_json(file: Path) -> Any:
    """Read the content of a JSON file.

    Raises:
        ValueError: naming the file, if it is not JSON or has a key twice.
    """
    try:
        return json.loads(file.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not readable JSON: {error}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def check_inside(file: Path, folder: Path) -> None:
    """Raise ValueError if a file is not in the folder, but a link to another place.

    The links of the hub's cache, from a snapshot to the blobs of the same repository, are allowed.

    Raises:
        ValueError: naming the link and its target.
    """
    root, target = folder.resolve(), file.resolve()
    cached = root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
    if not target.is_relative_to(root) and not cached:
        raise ValueError(f"{file.name} is a link to {target}, which is not allowed: it must lie in the folder.")


def small_files(folder: Path, code: bool) -> dict[str, Path]:
    """List the files of a checkpoint beside weights and config: tokenizer, generation config, chat templates, texts.

    Args:
        folder: the checkpoint.
        code: whether to include Python files that `auto_map` in the config may name. Those that the tokenizer's
            settings name are always included.

    Returns:
        The files by their names in the checkpoint, sorted.

    Raises:
        ValueError: if a file is a link to another place, or if the tokenizer's settings are no JSON.
    """
    files = [file for file in folder.iterdir() if file.is_file()]
    files += [file for name in TEMPLATE_FOLDERS for file in (folder / name).glob("*.jinja") if file.is_file()]
    settings = parse_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    named = json.dumps(settings.get("auto_map")) if isinstance(settings, dict) else ""
    found = {}
    for file in sorted(files):
        if file.name.startswith(".") or file.name in (CONFIG_NAME, MANIFEST_NAME):
            continue
        own_code = file.suffix == ".py" and not code and f'"{file.stem}.' not in named
        if own_code or file.name.endswith((*FOREIGN_WEIGHTS, ".safetensors", ".index.json")):
            continue
        check_inside(file, folder)
        found[file.relative_to(folder).as_posix()] = file
    return found


def file_identity(file: Path) -> list[object]:
    """Return name, size and time of the last change of a file."""
    return [file.name, file.stat().st_size, file.stat().st_mtime_ns]


def listed(names: Iterable[str]) -> str:
    """Format names for a message: the first ones, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more


__all__ = [
    "CONFIG_NAME",
    "DTYPES",
    "DTYPE_NAMES",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "TEMPLATE_FOLDERS",
    "WEIGHTS_NAME",
    "Checkpoint",
    "StateDict",
    "StoredTensor",
    "TensorSource",
    "check_inside",
    "file_identity",
    "listed",
    "parse_json",
    "read_header",
    "read_index",
    "small_files",
    "weight_files",
]
