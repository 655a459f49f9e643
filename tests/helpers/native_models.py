"""transformers' own tiny models, batches, and counts by another way."""

import torch
from torch import nn
from transformers import DeepseekV3Config as NativeConfig
from transformers import DeepseekV3ForCausalLM as NativeModel

from modeling_deepseekmoe.balancing.gates import find_biased_gates
from modeling_deepseekmoe.moe import DeepseekMoeGate

batch = torch.randint(3, 96, (8, 12), generator=torch.Generator().manual_seed(5))


def native_model() -> NativeModel:
    """transformers' own DeepSeek-V3, small."""
    torch.manual_seed(0)
    config = NativeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
        first_k_dense_replace=1, n_group=4, topk_group=2, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return NativeModel(config).train()


def reference_counts(model: nn.Module, rows: torch.Tensor, mask: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """Tokens of every expert (L, E), counted token by token from the gates of an evaluation pass."""
    chosen: list[torch.Tensor] = []
    handles = []
    for module in model.modules():
        if isinstance(module, DeepseekMoeGate):
            handles.append(module.register_forward_hook(lambda _, __, output: chosen.append(output[1].expert_ids)))
        elif type(module).__name__ == "DeepseekV3TopkRouter":
            handles.append(module.register_forward_hook(lambda _, __, output: chosen.append(output[2])))
    training = model.training
    model.eval()
    with torch.no_grad():
        model(rows, attention_mask=mask, **kwargs)
    model.train(training)
    for handle in handles:
        handle.remove()
    counts = torch.zeros(len(chosen), 8, dtype=torch.long)
    for layer, ids in enumerate(chosen):
        for token, real in zip(ids.tolist(), mask.flatten().tolist(), strict=True):
            for expert in token if real else ():
                counts[layer, expert] += 1
    return counts


def biases(model: nn.Module) -> list[torch.Tensor]:
    return [gate.bias.clone() for gate in find_biased_gates(model)]
