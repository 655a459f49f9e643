# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Save checkpoints of sharded models. No process holds the whole model: every rank writes some of the files."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..checkpoint_layout import config_of_what_is_saved
from ..configuration_deepseekmoe import DeepseekMoeConfig
from ..support.folders import INDEX_NAME
from ..support.library_support import has_adapters
from ..support.models import whole_tensor
from ..transformers_support import custom_object_save, revert_weight_conversion

UNFINISHED = ".unfinished"


def save_sharded(model: PreTrainedModel, folder: str | Path, max_shard_size: int | str = "5GB") -> int:
    """Write a checkpoint of a sharded model in the official layout, as `save_pretrained` does for a whole model.

    No process holds the whole model. The ranks write the files in turns, and a rank holds one file and one parameter
    at a time. All ranks must call this function.

    Args:
        model: sharded in any way (FSDP2, tensor and expert parallelism), or not at all. Adapters and wrappers are not
            allowed.
        folder: where the files go, on a file system that all machines share. Other files may be there. The weights of
            an earlier checkpoint are replaced after all new ones are written.
        max_shard_size: bytes of a file, or a size such as `"500MB"`. A parameter is never divided, and a stack of
            experts is one parameter.

    Returns:
        Bytes of all weights.

    Raises:
        ValueError: if the model is no `PreTrainedModel`, if its layers are not those of its config, or if
            `max_shard_size` is no size.
        OSError: if a rank does not see the folder that the first rank made.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is not allowed: save_sharded takes a PreTrainedModel.")
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT, which is not allowed: save_pretrained saves them."
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("A model of DeepSpeed ZeRO-3 is not allowed: call the trainer's save_model.")
    with config_of_what_is_saved(model) if isinstance(model.config, DeepseekMoeConfig) else nullcontext():
        return _write_sharded(model, Path(folder), max_shard_size)


def _write_sharded(model: PreTrainedModel, folder: Path, max_shard_size: int | str) -> int:
    state = _saved_state(model)
    rank, ranks = _rank_and_ranks()
    split = split_state_dict_into_shards_factory(
        state,
        get_storage_size=_size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files = list(split.filename_to_tensors.items())
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{UNFINISHED}"):
            left.unlink()
    _barrier()
    if not folder.is_dir():
        raise OSError(f"{folder} is not there for rank {rank}: all ranks must write to a file system that they share.")
    for first in range(0, len(files), ranks):
        mine: dict[str, torch.Tensor] = {}
        for writer, (_, names) in enumerate(files[first : first + ranks]):
            for name in names:
                whole = whole_tensor(state[name])
                if writer == rank:
                    for official, part in revert_weight_conversion(model, {name: whole.cpu()}).items():
                        # Experts are views of their stack: a file takes only tensors of their own.
                        mine[official] = part.clone(memory_format=torch.contiguous_format)
        if mine:
            save_file(mine, folder / (files[first + rank][0] + UNFINISHED), metadata={"format": "pt"})
    _barrier()
    if rank == 0:
        for file, _ in files:
            (folder / (file + UNFINISHED)).replace(folder / file)
        for pattern in ("model*.safetensors", "shard-*-model-*.safetensors", INDEX_NAME):
            for old in folder.glob(pattern):
                if old.name not in split.filename_to_tensors:
                    old.unlink()
        # As in save_pretrained.
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        if model.is_remote_code():
            custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if split.is_sharded:
            _write_index(model, state, split.tensor_to_filename, folder / INDEX_NAME)
    _barrier()
    return sum(map(_size, state.values()))


def _saved_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds, under the model's own names. A tied parameter is there once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize  # of a sharded one too: the whole


def _write_index(model: PreTrainedModel, state: dict[str, torch.Tensor], files: dict[str, str], path: Path) -> None:
    weight_map: dict[str, str] = {}
    for name, tensor in state.items():
        shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        weight_map |= dict.fromkeys(revert_weight_conversion(model, {name: shape}), files[name])
    metadata = {"total_size": sum(map(_size, state.values()))}
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


__all__ = ["save_sharded"]
