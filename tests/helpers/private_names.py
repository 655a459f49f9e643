"""The private names of other libraries that the project uses: each with the files where it may stand, and a canary.

`relies_on` makes a test of a statement about such names. When it fails, its message says what breaks without them.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

SUPPORT = {"transformers": "transformers_support", "torch": "torch_support", "peft": "support.peft_support"}


@dataclass(frozen=True)
class PrivateName:
    """A name, whose it is, and where it may stand."""

    name: str
    library: str
    files: tuple[str, ...]


LISTED: dict[str, PrivateName] = {}


def relies_on(library: str, *names: str, files: tuple[str, ...] = (), breaks: str) -> Callable:
    """List private names, and let a failure of the decorated test say what does not work without them.

    Args:
        library: whose names they are.
        names: the private ones; none for a statement about an undocumented name.
        files: modules of the package where they may stand; that of the library by default.
        breaks: what does not work without them.
    """
    for name in names:
        assert name not in LISTED, name
        LISTED[name] = PrivateName(name, library, files or (SUPPORT[library],))

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def canary(*args: object, **kwargs: object) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                what = ", ".join(names) or test.__name__.removeprefix("test_")
                raise AssertionError(
                    f"{library} {version(library)}: {what} is not what the package relies on. {breaks} "
                    f"({type(error).__name__}: {error})"
                ) from error

        return canary

    return decorate


V3 = dict(
    vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
)  # fmt: skip


def native(**kwargs: object) -> PreTrainedModel:
    """transformers' own DeepSeek-V3, tiny."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**V3, **kwargs)).eval()


def parameters(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)
