"""A checkpoint shaped as the released DeepSeek-V3: FP8 blocks, ragged ones too, and a multi-token-prediction layer.

Written with the safetensors library, under names that are spelt out here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, WIDTH, EXPERTS, LAYERS = 192, 128, 4, 2  # hidden: one block and a half
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "ep_size": 1,  # a field that nobody here knows
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 320,
    "kv_lora_rank": 128,
    "max_position_embeddings": 128,
    "moe_intermediate_size": WIDTH,
    "n_group": 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 32,
    "vocab_size": 160,
}
# Of the same model without FP8.
PLAIN_CONFIG = {name: value for name, value in CONFIG.items() if name != "quantization_config"}


def linears(layer: int) -> dict[str, tuple[int, int]]:
    """The FP8 weights of a layer."""
    attention = {
        "q_a_proj": (96, HIDDEN), "q_b_proj": (4 * 48, 96), "kv_a_proj_with_mqa": (144, HIDDEN),
        "kv_b_proj": (4 * 64, 128), "o_proj": (HIDDEN, 4 * 32),
    }  # fmt: skip
    found = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    ffns = {"mlp": 320} if layer == 0 else {"mlp.shared_experts": WIDTH} | {
        f"mlp.experts.{expert}": WIDTH for expert in range(EXPERTS)
    }  # fmt: skip
    for name, width in ffns.items():
        found |= {f"{name}.{half}_proj.weight": (width, HIDDEN) for half in ("gate", "up")}
        found[f"{name}.down_proj.weight"] = (HIDDEN, width)
    return {f"model.layers.{layer}.{name}": shape for name, shape in found.items()}


def v3_tensors(mtp: bool = True) -> dict[str, torch.Tensor]:
    """All tensors, random."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(160, HIDDEN), "lm_head.weight": normal(160, HIDDEN) / 8}
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(LAYERS + mtp):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = normal(HIDDEN) / 10 + 1
        tensors[f"{prefix}self_attn.q_a_layernorm.weight"] = torch.ones(96, dtype=torch.bfloat16)
        tensors[f"{prefix}self_attn.kv_a_layernorm.weight"] = torch.ones(128, dtype=torch.bfloat16)
        if layer:
            tensors[f"{prefix}mlp.gate.weight"] = normal(EXPERTS, HIDDEN)
            tensors[f"{prefix}mlp.gate.e_score_correction_bias"] = torch.randn(EXPERTS, generator=generator)
        if layer == LAYERS:
            tensors |= {f"{prefix}{name}.weight": normal(HIDDEN) for name in ("enorm", "hnorm", "shared_head.norm")}
            tensors[f"{prefix}eh_proj.weight"] = normal(HIDDEN, 2 * HIDDEN)
            tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        for name, (rows, columns) in linears(layer).items():
            values = torch.randn(rows, columns, generator=generator) * 100
            tensors[name] = values.to(torch.float8_e4m3fn)
            blocks = (-(-rows // 128), -(-columns // 128))
            tensors[f"{name}_scale_inv"] = torch.rand(blocks, generator=generator) * 2e-3 + 1e-4
    return tensors


def as_stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the experts of a layer in stacks, and their scales."""
    found = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in range(1, LAYERS + 1):
        prefix = f"model.layers.{layer}.mlp.experts."
        for suffix in ("", "_scale_inv"):

            def one(expert: int, half: str, prefix: str = prefix, suffix: str = suffix) -> torch.Tensor:
                tensor = tensors[f"{prefix}{expert}.{half}_proj.weight{suffix}"]
                return tensor if suffix else tensor.view(torch.uint8)

            if f"{prefix}0.up_proj.weight" in tensors:
                gate_up = [torch.cat([one(expert, "gate"), one(expert, "up")]) for expert in range(EXPERTS)]
                down = [one(expert, "down") for expert in range(EXPERTS)]
                for name, parts in (("gate_up", gate_up), ("down", down)):
                    stack = torch.stack(parts)
                    found[f"{prefix}{name}_proj{suffix}"] = stack if suffix else stack.view(torch.float8_e4m3fn)
    return found


def dequantized(tensors: dict[str, torch.Tensor], high: int = 128, wide: int = 128) -> dict[str, torch.Tensor]:
    """The FP8 weights in float32, value by value: an independent formula."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{name}_scale_inv"]
            rows = torch.arange(tensor.shape[0])[:, None] // high
            columns = torch.arange(tensor.shape[1])[None, :] // wide
            found[name] = tensor.to(torch.float32) * scales[rows, columns]
        else:
            found[name] = tensor
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 1) -> Path:
    """A checkpoint folder; with several shards, tensors are dealt out in turn, so that experts are far apart."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, through the safetensors library."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}


def same_bytes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names, dtypes, shapes and bytes."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype
        and tensor.shape == second[name].shape
        and torch.equal(tensor.reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8))
        for name, tensor in first.items()
    )
