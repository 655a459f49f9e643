"""A small model with multi-token prediction and its batches, for one process and for several."""

import torch

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM


def model_of(detach: bool = False) -> DeepseekMoeForCausalLM:
    """The same weights in every process."""
    torch.manual_seed(0)
    config = DeepseekMoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, scoring_func="sigmoid",
        topk_method="noaux_tc", norm_topk_prob=True, initializer_range=0.2, aux_loss_alpha=0.0,
        num_nextn_predict_layers=2, mtp=True, mtp_detach=detach,
    )  # fmt: skip
    return DeepseekMoeForCausalLM(config).train()


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    """Rows of a rank, padded on the right, of which each rank has another number of tokens."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 90, (3, 10), generator=generator)
    mask = (torch.arange(10) < torch.tensor([10, 7, 4 + rank])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
