"""Multi-token prediction: checkpoints with its layers in official names, and what they compute, spelt out."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conftest import Golden
from safetensors.torch import save_file
from synthetic import write
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM
from modeling_deepseekmoe.modeling_pretrained import CACHE

OWN = ("enorm", "hnorm", "shared_head.norm")


def golden_with_mtp(golden: Golden, folder: Path, depths: int = 1, copies: bool = True) -> Path:
    """The golden model of V3 with random layers of multi-token prediction behind its own."""
    tensors, config = golden.tensors, golden.config
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    generator = torch.Generator().manual_seed(3)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    found = dict(tensors)
    for number in range(1, depths + 1):
        prefix = f"model.layers.{last + number}."
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{last}."):
                spread = tensor.float().std().nan_to_num().to(tensor.dtype)
                found[prefix + name.removeprefix(f"model.layers.{last}.")] = tensor + noise(tensor) * spread / 2
        one = tensors["model.norm.weight"]
        found |= {f"{prefix}{name}.weight": one + noise(one) / 10 for name in OWN}
        found[f"{prefix}eh_proj.weight"] = noise(torch.empty(hidden, 2 * hidden, dtype=one.dtype)) / hidden**0.5
        if copies:
            found[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            found[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    write(folder, found, config | {"num_nextn_predict_layers": depths})
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def native_layer(tensors: dict[str, torch.Tensor], config: DeepseekV3Config, number: int) -> DeepseekV3DecoderLayer:
    """transformers' own decoder layer with the weights of a layer of multi-token prediction."""
    prefix = f"model.layers.{config.num_hidden_layers - 1 + number}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    experts = [f"mlp.experts.{expert}." for expert in range(config.n_routed_experts)]
    own["mlp.experts.gate_up_proj"] = torch.stack(
        [torch.cat([own[f"{one}gate_proj.weight"], own[f"{one}up_proj.weight"]]) for one in experts]
    )
    own["mlp.experts.down_proj"] = torch.stack([own[f"{one}down_proj.weight"] for one in experts])
    layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers - 1).eval()
    layer.load_state_dict({name: own[name] for name in layer.state_dict()})
    return layer


def rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return values * torch.rsqrt(values.pow(2).mean(dim=-1, keepdim=True) + eps) * weight


@torch.no_grad()
def reference_logits(
    model: DeepseekV3ForCausalLM, tensors: dict[str, torch.Tensor], ids: torch.Tensor, depths: int
) -> list[torch.Tensor]:
    """The logits of every depth (B, S - k, V): transformers' own layer and the equations, on shortened sequences."""
    config, hidden = model.config, model.model(ids).last_hidden_state
    eps, found = config.rms_norm_eps, []
    for number in range(1, depths + 1):
        prefix = f"model.layers.{config.num_hidden_layers - 1 + number}."
        embeds = F.embedding(ids[:, number:], tensors["model.embed_tokens.weight"])
        both = [
            rms_norm(embeds, tensors[f"{prefix}enorm.weight"], eps),
            rms_norm(hidden[:, : embeds.shape[1]], tensors[f"{prefix}hnorm.weight"], eps),
        ]
        joined = torch.cat(both, dim=-1) @ tensors[f"{prefix}eh_proj.weight"].T
        positions = torch.arange(embeds.shape[1])[None] + number  # of the tokens that are embedded
        mask = create_causal_mask(
            config=config, inputs_embeds=joined, attention_mask=torch.ones(joined.shape[:2]), position_ids=positions,
            **{CACHE: None},
        )  # fmt: skip
        output = native_layer(tensors, config, number)(
            joined,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=model.model.rotary_emb(joined, positions),
        )
        output = output[0] if isinstance(output, tuple) else output
        hidden = rms_norm(output, tensors[f"{prefix}shared_head.norm.weight"], eps)
        found.append(hidden @ tensors["lm_head.weight"].T)
    return found


def cycle(rows: int, length: int, noise: float = 0.1, vocabulary: int = 37, first: int = 3) -> torch.Tensor:
    """A text that a small model learns in part within seconds: mostly a token follows from the one or two before."""
    ids = torch.randint(first, first + vocabulary, (rows, length))
    for place in range(2, length):
        one, other = ids[:, place - 1], ids[:, place - 2]
        follows = (one * 3 + 1 + torch.where(one % 4 == 0, other % 3, 0)) % vocabulary + first
        ids[:, place] = torch.where(torch.rand(rows) < 1 - noise, follows, ids[:, place])
    return ids


def trained(steps: int = 20, blur: float = 2.2, **fields: Any) -> DeepseekMoeForCausalLM:
    """A small model, trained on `cycle`, with blurred layers ahead: drafts are accepted often, and not always."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
             "num_hidden_layers": 2, "num_attention_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 2,
             "n_shared_experts": 1, "eos_token_id": None, "num_nextn_predict_layers": 1, "mtp": True}  # fmt: skip
    model = DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**sizes, **fields})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        ids = cycle(16, 20)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for layer in model.model.layers[model.config.num_hidden_layers :]:
            weight = layer.eh_proj.weight
            weight += blur * weight.std() * torch.randn_like(weight)
    return model.eval()


def left_padded(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Prompts of which each is one token shorter than the one before."""
    ids = cycle(rows, length)
    mask = (torch.arange(length) >= torch.arange(rows)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def depth_logits(model: DeepseekMoeForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """The logits of every depth (B, S - k, V)."""
    with torch.no_grad():
        depths, _ = model.model.predict_ahead(model.model(ids).last_hidden_state, ids)
        return [model.lm_head(one.hidden_states)[:, :-depth] for depth, one in enumerate(depths, start=1)]
