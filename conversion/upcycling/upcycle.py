# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Upcycle a dense Llama-family checkpoint or model to DeepSeekMoE. It is compared and written layer by layer."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from modeling_deepseekmoe.configuration_deepseekmoe import DeepseekMoeConfig
from modeling_deepseekmoe.conversion.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    StateDict,
    TensorSource,
    file_identity,
    small_files,
)
from modeling_deepseekmoe.conversion.description import read_config
from modeling_deepseekmoe.conversion.locating import Matrix
from modeling_deepseekmoe.conversion.streamed_model import greedy_text, logits_of, streamed_model
from modeling_deepseekmoe.conversion.streaming import Cast, Output
from modeling_deepseekmoe.conversion.targets import Tensors, outputs
from modeling_deepseekmoe.conversion.tensor_table import entries
from modeling_deepseekmoe.conversion.upcycling.dividing import (
    UpcyclingPlan,
    dense_matrices,
    upcycled_config,
    upcycled_tensors,
)
from modeling_deepseekmoe.conversion.writing import FolderPlan, Writing, make_shards, write_folder
from modeling_deepseekmoe.modeling_deepseekmoe import DeepseekForCausalLM, DeepseekMoeForCausalLM
from modeling_deepseekmoe.remote_code import CODE_VERSION
from modeling_deepseekmoe.support.folders import check_destination, local_folder

logger = logging.get_logger(__name__)

STORED_DTYPES = ("keep", "float32", "bfloat16", "float16")
_CHECKED_TOKENS = (2, 48)  # random ones, sequences and their length
_PROMPT = 16


class UpcyclingError(RuntimeError):
    """The upcycled model does not compute what the dense model computes."""


@dataclass(frozen=True)
class UpcyclingCheck:
    """Result of the comparison with the dense model.

    Attributes:
        max_logit_difference: largest absolute difference of the logits.
        tolerance: largest difference that is allowed.
        same_text: whether the greedy continuations are equal.
        new_tokens: their length in tokens.
    """

    max_logit_difference: float
    tolerance: float
    same_text: bool
    new_tokens: int

    @property
    def passed(self) -> bool:
        """Whether the logits are within the tolerance and the continuations equal."""
        return self.max_logit_difference <= self.tolerance and self.same_text

    def __str__(self) -> str:
        text = "the same" if self.same_text else "NOT the same"
        return (
            f"max |logit difference| {self.max_logit_difference:.2e} (allowed {self.tolerance:g}), "
            f"greedy text of {self.new_tokens} tokens {text}"
        )


def upcycle(
    source: str | Path,
    destination: str | Path,
    plan: UpcyclingPlan,
    *,
    dtype: str = "keep",
    gguf_file: str | None = None,
    tolerance: float = 1e-3,
    check_tokens: int = 32,
    **writing: Any,
) -> UpcyclingCheck:
    """Upcycle a checkpoint folder, after a check of the result against the dense model.

    Everything is streamed: the check holds one layer in float32, the writing one block. Small files come along.
    `destination` appears only when it is complete.

    Args:
        source: folder or hub id of a dense checkpoint (Llama, Mistral, Qwen2, SmolLM2) in safetensors files.
        destination, plan: folder to write, which must not exist or be empty; how the FFNs are divided.
        dtype: dtype to store: `"keep"` (the source's), `"float32"`, `"bfloat16"` or `"float16"`.
        gguf_file: name of a GGUF file inside `source`, which is dequantised as a whole. Needs the `gguf` package.
        tolerance: largest allowed difference of the logits.
        check_tokens: length of the greedy text that must be the same. Each token reads the dense weights once.
        writing: fields of [`Writing`]: `max_shard_size`, `resume`, `report`, `progress`.

    Returns:
        [`UpcyclingCheck`].

    Raises:
        ValueError: if the source or the plan cannot be upcycled, or if the destination is in use.
        UpcyclingError: if the result does not equal the dense model. Nothing is written then.
        OSError: if a file is missing, or if the disk is full or cannot be written to.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed: it must be one of {', '.join(STORED_DTYPES)}.")
    how = Writing(**writing)
    path = check_destination(destination) if not how.resume else Path(destination).absolute()
    with _dense_folder(source, gguf_file, how.report) as folder:
        dense = _dense_config(folder)
        config = upcycled_config(dense, plan)
        checkpoint = Checkpoint(folder)
        matrices = dense_matrices(dense, config, checkpoint)
        stored = None if dtype == "keep" else getattr(torch, dtype)
        plain = matrices["model.embed_tokens.weight"].tensor.dtype
        config.dtype = str(stored or plain).removeprefix("torch.")
        how.report(f"Comparing the division of {dense.num_hidden_layers} FFNs with the dense model, layer by layer")
        exact = upcycled_tensors(config, matrices, plan, stored, noise=False)
        check = _check_streamed(dense, config, checkpoint, matrices, exact, tolerance, check_tokens)
        how.report(f"Compared with the dense model: {check}")
        if not check.passed:
            raise UpcyclingError(_difference(check, plan, stored or plain))
        noisy = upcycled_tensors(config, matrices, plan, stored, noise=True) if plan.noise else exact
        tensors = list(outputs(entries(config), noisy, "per-expert", config.n_routed_experts))
        # A GGUF file's tensors are written out anew for every run.
        identity = _gguf_identity(Path(source), gguf_file) if gguf_file else checkpoint.identity
        origin = {"version": CODE_VERSION, "plan": asdict(plan), "dtype": dtype, "source": identity}
        texts, shards = {CONFIG_NAME: config.to_json_string().encode()}, make_shards(tensors, how.max_shard_size)
        folder_plan = FolderPlan(shards, texts, small_files(folder, code=False), origin)
        write_folder(folder_plan, checkpoint, path, resume=how.resume, report=how.report, progress=how.progress)
    return check


def _dense_config(folder: Path) -> Any:
    """Read the config of a dense checkpoint, as AutoConfig does."""
    read_config(folder)  # there, readable, and no link to another place
    try:
        dense = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever a library makes of a field that is wrong
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    if getattr(dense, "quantization_config", None):  # of files; a model in memory may come from a GGUF file
        raise ValueError("quantization_config is not allowed as a source: upcycle what was quantised.")
    return dense


@contextmanager
def _dense_folder(source: str | Path, gguf_file: str | None, report: Callable[[str], None]) -> Iterator[Path]:
    """Yield the dense checkpoint in safetensors files. A GGUF file is written as such into a temporary folder."""
    if gguf_file is None:
        yield local_folder(source)
        return
    report(f"Dequantising {gguf_file}")
    with tempfile.TemporaryDirectory() as folder:
        save_dequantized(AutoModelForCausalLM.from_pretrained(source, dtype="auto", gguf_file=gguf_file), folder)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(folder)
        yield Path(folder)


def _gguf_identity(source: Path, gguf_file: str) -> list[object]:
    file = source / gguf_file
    return file_identity(file) if file.is_file() else [str(source), gguf_file]  # of the hub


def save_dequantized(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a model that came from a GGUF file as an ordinary checkpoint. transformers itself refuses to."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


def _difference(check: UpcyclingCheck, plan: UpcyclingPlan, dtype: torch.dtype) -> str:
    """Say how a check failed, with a hint if rounding explains it."""
    said = f"The upcycled model differs from the dense model: {check}."
    if plan.dialect != "deepseek" or dtype == torch.float32:
        return said
    return (
        f"{said} Dialect 'deepseek' folds the factor num_shards={plan.num_shards} into the down projections: exact in "
        f"{dtype} only for a power of two. Choose one, or dtype='float32'."
    )


def upcycle_model(dense: PreTrainedModel, plan: UpcyclingPlan, *, noise: bool = False) -> DeepseekMoeForCausalLM:
    """Make the DeepSeekMoE of a dense model, in its dtype and on its device.

    Args:
        dense: the model.
        plan: how the FFNs are divided.
        noise: whether to apply the plan's noise. With it the models are no longer equal.

    Raises:
        ValueError: if the architecture or the plan cannot be upcycled exactly.
    """
    if plan.noise and not noise:
        logger.warning_once(f"plan.noise={plan.noise} is not applied, so that the model is exact: pass noise=True.")
    config = upcycled_config(dense.config, plan)
    source = StateDict(dense.state_dict())
    tensors = upcycled_tensors(config, dense_matrices(dense.config, config, source), plan, None, noise=noise)
    with torch.device("meta"):
        model = (DeepseekForCausalLM if plan.dialect == "deepseek" else DeepseekMoeForCausalLM)(config)
    state = {
        output.name: output.read(source).to(dense.device)
        for output in outputs(entries(config), tensors, "stacked", config.n_routed_experts)
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    # The rotary embedding's buffers are in no checkpoint: take those of a model that was not built on meta.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(dense.device)
    model.generation_config = dense.generation_config
    return model.eval()


@torch.no_grad()
def verify_upcycling(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    tolerance: float = 1e-3,
    new_tokens: int = 32,
) -> UpcyclingCheck:
    """Compare the upcycled model with the dense model, both in evaluation mode.

    The dense model continues the first sequence greedily. The other model would write the same text if, after every
    prefix of that text, its best token is the next one. A single pass shows this.

    Args:
        dense, model: the two models, in the same dtype and on the same device.
        input_ids (`torch.LongTensor` of shape (B, S)): tokens to compare the logits on. The first sequence is also
            continued greedily by `new_tokens`.
        tolerance: largest allowed absolute difference of the logits.
    """
    if dense.device.type != "meta":  # a streamed model's weights come and go
        input_ids = input_ids.to(dense.device)
    difference = (logits_of(dense, input_ids).float() - logits_of(model, input_ids).float()).abs().max()
    prompt = input_ids[:1, : min(_PROMPT, input_ids.shape[1])]
    text = greedy_text(dense, prompt, new_tokens)
    best = logits_of(model, text[:, :-1])[:, prompt.shape[1] - 1 :].argmax(-1)
    return UpcyclingCheck(float(difference), tolerance, torch.equal(best, text[:, prompt.shape[1] :]), new_tokens)


def _check_streamed(
    dense: Any,
    config: DeepseekMoeConfig,
    source: TensorSource,
    matrices: Mapping[str, Matrix],
    tensors: dict[str, Tensors],
    tolerance: float,
    new_tokens: int,
) -> UpcyclingCheck:
    """Do as [`verify_upcycling`], for models whose weights are read layer by layer."""

    def dense_weight(name: str) -> torch.Tensor:
        matrix = matrices[name if name in matrices else "model.embed_tokens.weight"]
        shape = matrix.shape if len(matrix.tensor.shape) == 2 else matrix.shape[1:]
        return Output(name, shape, (Cast(matrix, torch.float32),)).read(source)

    stacked = {output.name: output for output in outputs(entries(config), tensors, "stacked", config.n_routed_experts)}

    def weight(name: str) -> torch.Tensor:
        return stacked[name if name in stacked else "model.embed_tokens.weight"].read(source).float()

    tokens = torch.randint(config.vocab_size, _CHECKED_TOKENS, generator=torch.Generator().manual_seed(0))
    return verify_upcycling(
        streamed_model(dense, None, dense_weight),
        streamed_model(config, f"{type(config).__name__.removesuffix('Config')}ForCausalLM", weight),
        tokens,
        tolerance=tolerance,
        new_tokens=new_tokens,
    )


__all__ = [
    "UpcyclingCheck",
    "UpcyclingError",
    "UpcyclingPlan",
    "save_dequantized",
    "upcycle",
    "upcycle_model",
    "verify_upcycling",
]
