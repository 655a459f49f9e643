# Copyright 2026 The modeling-deepseekmoe authors. Licensed under the Apache License, Version 2.0.
"""Adapters beside weights that transformers has spread over ranks, by tensor or by expert.

Every rank holds the adapters as a whole, and computes with the part that belongs to its part of the weights. So their
files are the ordinary ones, and any number of ranks resumes from them. A rank has the gradient of its part alone. If
the ranks of a tensor-parallel group share one batch, this gradient is multiplied here by their number. Then the mean
over all ranks, which Trainer takes, is the gradient.

Shape letters: E experts, D hidden, I expert width, r rank.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..support.expert_parts import own_chunk, scale_gradient
from ..support.peft_support import mesh_of, spread_ourselves

LATENT_PROJECTION = "mla_kv_a_proj"  # its style in the plans


def _is_spread_by_tensor(weight: torch.Tensor) -> bool:
    """Tell whether the ranks of a tensor-parallel group hold parts of a weight."""
    if not isinstance(weight, DTensor) or "tp" not in (weight.device_mesh.mesh_dim_names or ()):
        return False
    return not weight.placements[weight.device_mesh.mesh_dim_names.index("tp")].is_replicate()


def linear_with_factors(
    weight: Any, rows: torch.Tensor, factor_a: torch.Tensor, factor_b: torch.Tensor
) -> torch.Tensor:
    """Compute `rows @ factor_a.T @ factor_b.T` as a linear layer of this weight would.

    The weight may be spread by tensor.

    Args:
        weight: the weight of the layer, (out, in).
        rows (`torch.Tensor` of shape (T, in)): the layer's input, or this rank's part of it if the columns are spread.
        factor_a, factor_b: (r, in) and (out, r), whole.

    Returns:
        `torch.Tensor` of shape (T, out), or this rank's part of it if the rows are spread.
    """
    if not _is_spread_by_tensor(weight):
        return rows @ factor_a.t() @ factor_b.t()
    mesh = weight.device_mesh["tp"]
    placement = weight.placements[weight.device_mesh.mesh_dim_names.index("tp")]
    if placement == Shard(0):
        own = own_chunk(len(factor_b), mesh, "tp")
        rows = DTensor.from_local(rows, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        factor_a, factor_b = (scale_gradient(factor, mesh.size()) for factor in (factor_a, factor_b[own]))
        return rows @ factor_a.t() @ factor_b.t()
    if placement == Shard(1):
        own = own_chunk(factor_a.shape[1], mesh, "tp")
        inner = rows @ scale_gradient(factor_a[:, own], mesh.size()).t()
        inner = DTensor.from_local(inner, mesh, [Partial()], run_check=False)
        return inner.redistribute(placements=[Replicate()]).to_local() @ factor_b.t()
    raise ValueError(f"Adapters are not allowed beside a weight that is placed as {placement}.")


def refuse_merging(weight: torch.Tensor) -> None:
    """Raise a `ValueError` if ranks hold parts of a weight."""
    if isinstance(weight, DTensor):
        raise ValueError("Merging is not allowed into sharded weights: save the adapter and run `deepseekmoe merge`.")


def refuse_dropout(weight: torch.Tensor, probability: float, experts: nn.Module | None = None) -> None:
    """Raise a `ValueError` for dropout if ranks share a batch: each of them would drop something else."""
    if not probability or not isinstance(weight, DTensor):
        return
    names = weight.device_mesh.mesh_dim_names or ()
    shared = weight.device_mesh.size(names.index("tp")) if "tp" in names else 1
    if "ep" in names and experts is not None:
        shared = experts.config.distributed_config.tp_size
    if shared > 1:
        raise ValueError(
            f"lora_dropout={probability} is not allowed where {shared} ranks share a batch: it must be 0."
        )


class ShardedLinearLora(Linear):
    """LoRA on an `nn.Linear` whose weight is sharded, by tensor or by FSDP. Each rank holds the whole adapter.

    PEFT's own layer takes its sizes from the shard, except under FSDP without replicas.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter; see `peft.tuners.lora.LoraLayer.update_layer`.

        Raises:
            ValueError: for dropout where several ranks share a batch.
        """
        refuse_dropout(self.base_layer.weight, config.lora_dropout)
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        spread_ourselves(self.base_layer)
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raise a `ValueError`: the weight is not whole."""
        refuse_merging(self.base_layer.weight)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Apply the linear map with its adapters, as this rank has it: (..., in) becomes (..., out).

        Raises:
            ValueError: for a mixed batch, DoRA or another variant of LoRA.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None or self.lora_variant:
            raise ValueError("Mixed batches and variants of LoRA are not allowed on sharded weights.")
        output = self.base_layer(x, *args, **kwargs)
        for name in () if self.disable_adapters or self.merged else self.active_adapters:
            if name in self.lora_A:
                factors = self.lora_A[name].weight, self.lora_B[name].weight
                rows = self.lora_dropout[name](x).to(factors[0].dtype)
                delta = linear_with_factors(self.base_layer.weight, rows.flatten(0, -2), *factors)
                output = output + (delta * self.scaling[name]).view_as(output).to(output.dtype)
        return output


def hook_latent_projection(layer: nn.Linear, adapted: nn.Module) -> None:
    """Move what tensor parallelism does to the gradient of MLA's latent projection from the layer to its adapted form.

    Every rank has the gradient of its own heads. The sum is the gradient of the adapter too.

    Args:
        layer: `kv_a_proj_with_mqa`, whose forward transformers has replaced.
        adapted: PEFT's layer around it.
    """
    from ..transformers_support import ALL_PARALLEL_STYLES

    del layer.forward
    adapted.config = layer.config
    ALL_PARALLEL_STYLES[LATENT_PROJECTION].install_forward(adapted, mesh_of(layer))
    spread_ourselves(layer)


__all__ = [
    "LATENT_PROJECTION",
    "ShardedLinearLora",
    "hook_latent_projection",
    "linear_with_factors",
    "refuse_dropout",
    "refuse_merging",
]
