"""Load what `publish.py` has published, as somebody else would, and compare: `load_published.py HOW FOLDER NAME...`.

HOW is `remote` (transformers alone, with the code of the repositories) or `package`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

IDS = torch.arange(2, 26).view(2, 12)


def load(how: str, name: str) -> torch.nn.Module:
    """A model from the Hub."""
    arguments = {"trust_remote_code": True} if how == "remote" else {}
    if name == "adapter":
        from peft import PeftModel

        import modeling_deepseekmoe

        base = AutoModelForCausalLM.from_pretrained("alice/ours")
        return modeling_deepseekmoe.optimize_expert_lora(PeftModel.from_pretrained(base, "alice/adapter"))
    auto = AutoModelForSequenceClassification if name == "classifier" else AutoModelForCausalLM
    return auto.from_pretrained(f"alice/{name}", **arguments)


@torch.no_grad()
def main() -> None:
    """Compare."""
    how, folder = sys.argv[1], Path(sys.argv[2])
    if how == "package":
        import modeling_deepseekmoe

        modeling_deepseekmoe.register(override_native=True)
    for name in sys.argv[3:]:
        model = load(how, name).eval()
        expected = load_file(folder / f"{name}.safetensors")
        difference = (model(input_ids=IDS).logits - expected["logits"]).abs().max().item()
        same = "generated" not in expected or torch.equal(
            model.generate(IDS[:1], max_new_tokens=8, do_sample=False), expected["generated"]
        )
        print(f"{name}: {type(model).__module__.split('.')[0]} difference {difference:.2e} same text {same}")
        if name in ("ours", "v1", "trained"):
            arguments = {"trust_remote_code": True} if how == "remote" else {}
            tokenizer = AutoTokenizer.from_pretrained(f"alice/{name}", **arguments)
            text = "hello world\n  def f(x):"
            print(f"{name}: tokenizer {tokenizer.decode(tokenizer(text).input_ids) == text}")
    loaded = {module.split(".")[0] for module in sys.modules}
    print(
        "imported:", *sorted(loaded & {"modeling_deepseekmoe", "transformers_modules", "triton", "peft", "accelerate"})
    )


if __name__ == "__main__":
    main()
