"""A Hub with tiny random models under the names that the documentation uses, and the files that its commands read."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from local_hub import HubServer, keep
from tokenizers_of_tests import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_deepseekmoe import (
    DeepseekConfig,
    DeepseekForCausalLM,
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)
from modeling_deepseekmoe.remote_code import attach_code, carries_code

_SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
          "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
          "n_shared_experts": 2, "num_experts_per_tok": 3, "max_position_embeddings": 512,
          "first_k_dense_replace": 1}  # fmt: skip
_MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_V3 = {**_MLA, "q_lora_rank": 16, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_DENSE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 1536, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip


def models() -> dict[str, PreTrainedModel]:
    """The models, by the names of their repositories."""
    torch.manual_seed(0)
    qwen = Qwen3MoeConfig(**{**_DENSE, "intermediate_size": 64}, moe_intermediate_size=16, num_experts=8,
                          num_experts_per_tok=2, head_dim=8)  # fmt: skip
    return {
        "deepseek-ai/deepseek-moe-16b-base": DeepseekForCausalLM(DeepseekConfig(**_SIZES)),
        "deepseek-ai/DeepSeek-V2-Lite": DeepseekV2ForCausalLM(DeepseekV2Config(**_SIZES, **_MLA)),
        "deepseek-ai/DeepSeek-V3": DeepseekV3ForCausalLM(DeepseekV3Config(**{**_SIZES, **_V3}, mtp=True)),
        "me/my-moe": DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**_SIZES, **_V3}, norm_topk_prob=True)),
        "HuggingFaceTB/SmolLM2-135M": LlamaForCausalLM(LlamaConfig(**_DENSE)),
        "Qwen/Qwen3-30B-A3B": Qwen3MoeForCausalLM(qwen),
    }


def fill_hub(server: HubServer, folder: Path) -> None:
    """Put the models, each with a tokenizer, into a Hub."""
    for name, model in models().items():
        place = folder / name
        model.save_pretrained(place)
        chat_tokenizer().save_pretrained(place)
        if carries_code(model.config.model_type):
            attach_code(place)
        files = {path.name: keep(server.storage, path.read_bytes()) for path in sorted(place.iterdir())}
        content = {"owner": name.split("/")[0], "private": False, "branches": {}, "commits": {}}
        server.storage.commit(content, "main", files, "Upload model")
        server.storage.write(name, content)


def write_texts(folder: Path) -> None:
    """`text.txt`, `task.jsonl` with rows of `text`, `chat.jsonl`: pages of Python's language reference."""
    pages = [topics[name] for name in sorted(topics)[:40]]
    (folder / "text.txt").write_text("\n".join(pages), encoding="utf-8")
    rows = "".join(json.dumps({"text": page[:400]}) + "\n" for page in pages)
    (folder / "task.jsonl").write_text(rows, encoding="utf-8")
    ask = {"role": "user", "content": "Go on."}
    chats = [{"messages": [ask, {"role": "assistant", "content": page[:90]}]} for page in pages]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
