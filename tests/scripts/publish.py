"""Publish models of every kind on the Hub that HF_ENDPOINT names, and write what they compute: `publish.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import modeling_deepseekmoe
from modeling_deepseekmoe import (
    DeepseekForCausalLM,
    DeepseekMoeConfig,
    DeepseekMoeForCausalLM,
    DeepseekMoeForSequenceClassification,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    LoadBalancingCallback,
    ModelCardCallback,
    expert_lora_config,
    optimize_expert_lora,
)
from modeling_deepseekmoe.hub.card import CardFacts
from modeling_deepseekmoe.hub.plan import plan_push
from modeling_deepseekmoe.hub.push import push_model, upload

FOLDER = Path(sys.argv[1])
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
IDS = torch.arange(2, 26).view(2, 12)
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
V3_LIKE = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
}


class Rows(Dataset):
    """Rows of arbitrary tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(12) * (row + 3) % 256
        return {"input_ids": ids, "labels": ids.clone()}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=alphabet[0], eos_token=alphabet[1], pad_token=alphabet[1]
    )


@torch.no_grad()
def note(name: str, model: nn.Module) -> None:
    """Write what a model computes."""
    model = model.eval()
    found = {"logits": model(input_ids=IDS).logits.contiguous()}
    if model.can_generate():
        found["generated"] = model.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=False)
    save_file(found, FOLDER / f"{name}.safetensors")


def main() -> None:
    """Publish everything."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ours = DeepseekMoeForCausalLM(DeepseekMoeConfig(**SIZES, **V3_LIKE))
    nn.init.normal_(ours.model.layers[1].mlp.gate.e_score_correction_bias, std=0.1)
    ours.push_to_hub("alice/ours", tokenizer=tokenizer, license="mit", datasets=["alice/text"], max_shard_size="60KB")
    note("ours", ours)

    v1 = DeepseekForCausalLM.from_pretrained(GOLDEN / "v1-mha")
    # A vocabulary as large as the tokenizer's, and the tokenizer under the name that the first generation gave it.
    v1.resize_token_embeddings(256)
    v1.save_pretrained(FOLDER / "v1", max_shard_size="300KB")
    tokenizer.save_pretrained(FOLDER / "v1")
    settings = json.loads((FOLDER / "v1" / "tokenizer_config.json").read_text())
    (FOLDER / "v1" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"})
    )
    upload(plan_push(FOLDER / "v1", "alice/v1", facts=CardFacts(license="other", license_name="deepseek")))
    note("v1", v1)

    publish_native_types()
    publish_the_rest(tokenizer)


def publish_native_types() -> None:
    """Models of the types that transformers has classes of its own for."""
    v3 = DeepseekV3ForCausalLM.from_pretrained(GOLDEN / "v3-noaux")
    v3.push_to_hub("alice/v3", license="mit", max_shard_size="300KB")
    note("v3", v3)
    v3.push_to_hub("alice/v3-code", license="mit", code="always")
    note("v3-code", v3)
    v2 = DeepseekV2ForCausalLM.from_pretrained(GOLDEN / "v2-lite")
    v2.push_to_hub("alice/v2-code", license="mit", code="always")
    note("v2-code", v2)


def publish_the_rest(tokenizer: PreTrainedTokenizerFast) -> None:
    """A classifier, an adapter, and what a Trainer uploads."""
    classifier = DeepseekMoeForSequenceClassification(DeepseekMoeConfig(**SIZES, num_labels=3))
    classifier.save_pretrained(FOLDER / "saved", push_to_hub=True, repo_id="alice/classifier")
    note("classifier", classifier)

    base = DeepseekMoeForCausalLM.from_pretrained("alice/ours")
    adapted = get_peft_model(base, expert_lora_config(base, r=2, target_modules=("q_proj", "o_proj")))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.5)
    optimize_expert_lora(adapted)
    adapted.push_to_hub("alice/adapter")
    push_model(adapted, "alice/lora", license="mit")
    note("adapter", adapted)

    # As a user has it: the token as an argument, which Trainer pickles with the others.
    from huggingface_hub import get_token

    trained = DeepseekMoeForCausalLM(DeepseekMoeConfig(**SIZES, **V3_LIKE))
    arguments = TrainingArguments(
        str(FOLDER / "trained"), max_steps=6, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
        learning_rate=0.02, report_to="none", use_cpu=True, push_to_hub=True, hub_model_id="alice/trained",
        hub_token=get_token(), hub_strategy="checkpoint", hub_always_push=True,
    )  # fmt: skip
    trainer = Trainer(
        trained, arguments, train_dataset=Rows(), processing_class=tokenizer, callbacks=[LoadBalancingCallback(0.01)]
    )
    ModelCardCallback(license="apache-2.0", datasets=["alice/text"]).add_to(trainer)
    trainer.train()
    trainer.push_to_hub()
    note("trained", trained)
    trained.save_pretrained(FOLDER / "ordinary")
    assert modeling_deepseekmoe.__version__


if __name__ == "__main__":
    main()
