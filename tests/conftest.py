"""Fixtures: the golden checkpoints, tiny configs of every generation, and a registration that leaves no trace."""

import importlib.util
import json
import logging as pylogging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import GOLDEN_ROOT, ROOT

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU; read when Triton is imported

import huggingface_hub
import pytest
from huggingface_hub import constants
from local_hub import WRITER, HubServer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

import modeling_deepseekmoe

if importlib.util.find_spec("modeling_deepseekmoe.configuration") is None:  # not installed: only lies here
    modeling_deepseekmoe.__path__.append(str(ROOT))

from modeling_deepseekmoe import DeepseekMoeConfig, DeepseekMoeForCausalLM, experts
from modeling_deepseekmoe.moe import DeepseekMoeExperts

GOLDEN_NAMES = sorted(path.name for path in GOLDEN_ROOT.iterdir() if path.is_dir())
TRAINABLE_NAMES = [name for name in GOLDEN_NAMES if not name.startswith("v3")]
EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "deepseekmoe")


@dataclass(frozen=True)
class Golden:
    """A tiny official checkpoint and what the official code computes on it."""

    name: str

    @property
    def folder(self) -> Path:
        return GOLDEN_ROOT / self.name

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    @property
    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    def model(self, **kwargs: object) -> torch.nn.Module:
        """The checkpoint through AutoModel, in evaluation mode."""
        return AutoModelForCausalLM.from_pretrained(self.folder, **kwargs).eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", action="store_true", help="of every test only the first and the last parameters")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --few, for versions whose part in a test does not depend on its parameters: keep two of each test's."""
    if not config.getoption("few"):
        return
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(item) for same in by_test.values() for item in (same[0], same[-1])}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


# For tests in which it matters: experts as in large models, and as small as they are.
BOTH_SIZES = pytest.mark.parametrize("size_of_experts", [0, experts.LOOP_FROM], indirect=True, ids=["large", "small"])


@pytest.fixture(autouse=True)
def size_of_experts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny experts of the tests are computed as large ones are, unless a test says otherwise."""
    monkeypatch.setattr(experts, "LOOP_FROM", getattr(request, "param", 0))


@pytest.fixture(autouse=True)
def override_native() -> Iterator[None]:
    """AutoModel loads every generation with this package's classes; a test may register otherwise."""
    modeling_deepseekmoe.register(override_native=True)
    yield
    modeling_deepseekmoe.register()


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """The same random numbers in every test, and nothing of another one: no compiled code, no warning that was given
    already."""
    torch.manual_seed(0)
    torch.compiler.reset()
    logging.get_logger("modeling_deepseekmoe").warning_once.cache_clear()


@pytest.fixture
def hub_server(tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on the loopback interface."""
    server = HubServer(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub that this process speaks with, as user alice, with an empty cache and without waiting between trials."""
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub_server.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub_server


@pytest.fixture
def warnings_of_package() -> Iterator[list[str]]:
    """What the package warns of."""
    messages: list[str] = []
    handler = pylogging.Handler(pylogging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = pylogging.getLogger("modeling_deepseekmoe")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the first generation, in several files."""
    from modeling_deepseekmoe.conversion import convert

    convert(GOLDEN_ROOT / "v1-mha", tmp_path / "folder", max_shard_size="300KB")
    return tmp_path / "folder"


@pytest.fixture
def adapter(hub: HubServer, folder: Path, tmp_path: Path) -> Path:
    """An adapter of a model on the Hub."""
    from peft import get_peft_model
    from publishing_cases import push
    from torch import nn

    push(folder, "alice/base")
    base = modeling_deepseekmoe.DeepseekForCausalLM.from_pretrained("alice/base")
    adapted = get_peft_model(base, modeling_deepseekmoe.expert_lora_config(base, r=2, target_modules=("o_proj",)))
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def count_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Counts the calls of an experts implementation of transformers, or of the eager one of this package."""

    def count(implementation: str) -> list[str]:
        calls: list[str] = []
        if implementation == "eager":
            original = DeepseekMoeExperts.forward.__wrapped__

            def argsort(tensor: torch.Tensor, **kwargs: object) -> torch.Tensor:
                calls.append(implementation)
                return torch_argsort(tensor, **kwargs)

            torch_argsort = torch.Tensor.argsort
            assert "argsort" in original.__code__.co_names
            monkeypatch.setattr(torch.Tensor, "argsort", argsort)
        else:
            original = ALL_EXPERTS_FUNCTIONS[implementation]

            def forward(*args: object) -> torch.Tensor:
                calls.append(implementation)
                return original(*args)

            monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, implementation, forward)
        return calls

    return count


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture
def v1() -> Golden:
    return Golden("v1-mha")


@pytest.fixture
def v3() -> Golden:
    return Golden("v3-noaux")


MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
V3_LIKE = {**MLA, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2,
           "norm_topk_prob": True, "routed_scaling_factor": 2.5}  # fmt: skip
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "aux_loss_alpha": 0.01,
}


@pytest.fixture
def tiny_config() -> Callable[..., DeepseekMoeConfig]:
    """Makes a small config; keyword arguments override its fields."""
    return lambda **kwargs: DeepseekMoeConfig(**{**TINY, **kwargs})


@pytest.fixture
def tiny_model(tiny_config: Callable[..., DeepseekMoeConfig]) -> Callable[..., DeepseekMoeForCausalLM]:
    """Makes a small random model in training mode, the same for the same arguments."""

    def make(**kwargs: object) -> DeepseekMoeForCausalLM:
        torch.manual_seed(0)
        return DeepseekMoeForCausalLM(tiny_config(**kwargs)).train()

    return make


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A dense checkpoint folder with a byte-level tokenizer."""
    from dense_models import dense_model
    from tokenizers_of_tests import byte_level
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "dense"
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="Ā", eos_token="ā").save_pretrained(folder)
    dense_model("llama").to(torch.bfloat16).save_pretrained(folder)
    return folder
