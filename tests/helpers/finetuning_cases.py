"""Tiny checkpoints with a chat template, files of rows made of real text, and runs on them."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from conftest import TINY, V3_LIKE
from safetensors.torch import load_file
from tokenizers_of_tests import TEMPLATE, chat_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM

SIZES = {**TINY, "vocab_size": 300, "max_position_embeddings": 160, "bos_token_id": 188, "eos_token_id": 189}
MARKED = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def checkpoint(folder: Path, template: str | None = TEMPLATE, biased: bool = False, **fields: object) -> Path:
    """A random model with a tokenizer; `biased`: with the gates of V3, which have a balancing bias."""
    torch.manual_seed(1)
    model = DeepseekMoeForCausalLM(DeepseekMoeConfig(**{**SIZES, **(V3_LIKE if biased else {}), **fields}))
    model.save_pretrained(folder)
    chat_tokenizer(template).save_pretrained(folder)
    return folder


def native_checkpoint(folder: Path) -> Path:
    """A random model of another family, with transformers' own class."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
             "max_position_embeddings": 160}  # fmt: skip
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def chats(number: int) -> list[dict]:
    """Questions and answers of different lengths about the topics of Python's reference."""
    rows = []
    for place, name in enumerate(sorted(topics)[:number]):
        text = " ".join(topics[name].split())
        question = {"role": "user", "content": f"What is {name.lower()}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": text[: 20 + 11 * place % 60]}]})
    return rows


def write_rows(path: Path, rows: list) -> Path:
    """A file of JSON lines; a text among the rows is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(first: Path, second: Path) -> None:
    """Both folders hold the same tensors, bit for bit."""
    one, other = tensors_of(first), tensors_of(second)
    assert one and one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
